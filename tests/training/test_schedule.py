"""The learning rate rises, falls as asked, and follows a new course when a run goes on longer."""

from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_peft.training.schedule import Course, warmup_decay


@pytest.mark.parametrize("course", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 10])
def test_it_rises_to_one_and_no_step_is_wasted(course: Course, warmup: int) -> None:
    factors = [warmup_decay(i, steps=10, warmup=warmup, course=course) for i in range(10)]
    rising, falling = factors[: warmup + 1], factors[warmup:]
    assert rising == sorted(set(rising))
    assert falling == sorted(falling, reverse=True)
    assert min(factors) > 0
    if warmup < 10:
        assert factors[warmup] == 1
    if course == "constant":
        assert set(falling) <= {1.0}


def test_the_courses_are_what_they_are_called() -> None:
    linear = [warmup_decay(i, steps=8, warmup=0, course="linear") for i in range(10)]
    assert linear == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0])
    cosine = [warmup_decay(i, steps=8, warmup=0, course="cosine") for i in (0, 2, 4, 6, 8)]
    assert cosine == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])


def test_a_restored_scheduler_follows_the_new_course() -> None:
    def made(steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return optimizer, LambdaLR(optimizer, partial(warmup_decay, steps=steps, warmup=0))

    optimizer, schedule = made(4)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0]
    longer, resumed = made(8)
    resumed.load_state_dict(schedule.state_dict())
    longer.step()
    resumed.step()
    assert resumed.get_last_lr() == pytest.approx([3 / 8])
