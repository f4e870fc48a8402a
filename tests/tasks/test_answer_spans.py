import torch

from lightning_peft.tasks.answer_spans import best_spans, span_scores

OUTSIDE = [-1, -1]


def every_span(start, end, offsets, numbers, longest):
    """All spans of all windows by question, found one by one."""
    found = {}
    for w, number in enumerate(numbers):
        for i, (begin, _) in enumerate(offsets[w]):
            for j in range(i, min(i + longest, len(offsets[w]))):
                if begin >= 0 and offsets[w][j][1] > offsets[w][j][0] >= 0:
                    score = (start[w][i] + end[w][j]).item()
                    place = begin, offsets[w][j][1]
                    spans = found.setdefault(number, {})
                    spans.setdefault(place, []).append(score)
    return found


def batch_of(offsets, numbers, null):
    return {
        "row_offsets": torch.tensor(offsets),
        "row_numbers": torch.tensor(numbers),
        "row_null": torch.tensor(null),
        "row_contexts": ["x" * 99] * (max(numbers) + 1),
    }


def test_spans_are_the_best_of_all():
    generator = torch.Generator().manual_seed(4)
    # Two windows of the first question share two tokens; the second has padding on the left.
    offsets = [
        [OUTSIDE, OUTSIDE, [0, 3], [4, 6], [7, 9], [10, 12], OUTSIDE],
        [OUTSIDE, OUTSIDE, [7, 9], [10, 12], [13, 15], [16, 18], OUTSIDE],
        [OUTSIDE, OUTSIDE, OUTSIDE, [0, 2], [3, 4], [5, 9], OUTSIDE],
    ]
    numbers, null = [0, 0, 1], [0, 0, 1]
    start, end = (torch.randn(3, 7, generator=generator) for _ in range(2))
    for longest in (1, 2, 9):
        expected = every_span(start, end, offsets, numbers, longest)
        for allowed in (True, False):
            found = best_spans(start, end, batch_of(offsets, numbers, null), 4, longest, allowed)
            for number, one in enumerate(found):
                best = {place: max(scores) for place, scores in expected[number].items()}
                ranked = sorted(best, key=best.__getitem__, reverse=True)[:4]
                assert [(span.start, span.end) for span in one.spans] == ranked
                assert [span.score for span in one.spans] == [best[place] for place in ranked]
                nulls = [(start[w, null[w]] + end[w, null[w]]).item() for w in range(3)]
                lowest = min(n for n, w in zip(nulls, numbers, strict=True) if w == number)
                assert one.null == lowest
                scores = [s for spans in expected[number].values() for s in spans]
                scores += [lowest] if allowed else []
                torch.testing.assert_close(
                    one.evidence, torch.tensor(scores).double().logsumexp(0).item()
                )


def test_a_window_without_a_context_has_no_span():
    batch = batch_of([[OUTSIDE, OUTSIDE, [0, 0]]], [0], [0])
    (found,) = best_spans(torch.zeros(1, 3), torch.zeros(1, 3), batch, 5, 30, True)
    assert found.spans == []
    assert found.evidence == found.null == 0


def test_a_span_ends_where_the_context_does():
    inside = torch.tensor([[False, True, True, False]])
    scores = span_scores(torch.zeros(1, 4), torch.zeros(1, 4), inside, 3)
    assert scores.isfinite().nonzero().tolist() == [[0, 1, 0], [0, 1, 1], [0, 2, 0]]
