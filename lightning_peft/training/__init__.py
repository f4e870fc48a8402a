"""What happens to a LightningModule while an adapter trains in it."""
