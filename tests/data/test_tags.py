import pytest

from lightning_peft.data.tags import fault, tags_of, to_bio, types_of


def test_tags_are_o_and_two_of_each_type():
    assert types_of([["B-b", "I-b", "O"], ["B-a"]]) == ("a", "b")
    assert tags_of(("a", "b")) == ("O", "B-a", "I-a", "B-b", "I-b")


@pytest.mark.parametrize(
    ("scheme", "tags", "bio"),
    [
        ("bio", "B-x I-x O B-x", "B-x I-x O B-x"),
        ("iob1", "I-x I-x O I-y I-x B-x I-x", "B-x I-x O B-y B-x B-x I-x"),
        ("bioes", "B-x I-x E-x S-y O", "B-x I-x I-x B-y O"),
        ("bioes", "B-x L-x U-y O", "B-x I-x B-y O"),
        ("bio", "B-a-b I-a-b", "B-a-b I-a-b"),
    ],
)
def test_every_scheme_becomes_bio(scheme, tags, bio):
    assert fault(tags.split(), scheme, None) is None
    assert to_bio(tags.split(), scheme) == bio.split()


@pytest.mark.parametrize(
    ("scheme", "tags", "place", "message"),
    [
        ("bio", "O I-x", 1, "'I-x' must follow B-x or I-x, but follows 'O'"),
        ("bio", "B-y I-x", 1, "'I-x' must follow B-x or I-x, but follows 'B-y'"),
        ("bio", "I-x", 0, "follows 'O'"),
        ("bio", "O S-x", 1, "must be O or one of B-<type>, I-<type>, but is 'S-x'"),
        ("bio", "person", 0, "but is 'person'"),
        ("bio", "O B-", 1, "but is 'B-'"),
        ("bio", "B-z", 0, "must be of the types x, y, but is 'B-z'"),
        ("bioes", "B-x O", 0, "'B-x' must be followed by I-x or E-x, but is by 'O'"),
        ("bioes", "E-x", 0, "'E-x' must follow B-x or I-x"),
        ("bioes", "S-x I-x E-x", 1, "'I-x' must follow"),
        ("iob1", "E-x", 0, "must be O or one of"),
    ],
)
def test_the_first_fault_is_told(scheme, tags, place, message):
    found = fault(tags.split(), scheme, ("x", "y"))
    assert found is not None
    assert found[0] == place
    assert message in found[1]


def test_a_misspelt_type_gets_its_near_misses():
    found = fault(["B-locaton"], "bio", ("location", "person"))
    assert found is not None
    assert "did you mean `location`" in found[1]
