"""Layer maps: as the originals pair layers, and as sentences say where they do not fit."""

from __future__ import annotations

import json

import pytest
from predistill.store.errors import ConfigError
from predistill.student_train.layers import layer_map

HIDDEN, ATTENTIONS = "hidden_states", "attentions"


def full(text, kind, student, teacher):
    return layer_map(text, kind, student, teacher, range(teacher + 1))


def as_recorded(case, kind):
    return tuple((student, teacher) for student, teacher in case[kind])


def test_maps_are_those_of_the_originals(oracle_dir):
    """TinyBERT and Haystack refuse depths that do not divide; here `uniform` rounds."""
    seen = set()
    for case in json.loads((oracle_dir / "layer_maps.json").read_text()):
        depths = case["num_student_layers"], case["num_teacher_layers"]
        tutorial = case["source"].startswith("tutorial")
        if "error" in case:
            assert depths[1] % depths[0] and not tutorial
            continue
        names = ["tutorial"] if tutorial else ["uniform", f"every-{depths[1] // depths[0]}"]
        for kind in (HIDDEN, ATTENTIONS):
            for name in names:
                assert full(name, kind, *depths) == as_recorded(case, kind), (name, depths, case["source"])
        seen.update(names)
    assert {"tutorial", "uniform", "every-1", "every-2", "every-4"} <= seen


@pytest.mark.parametrize(("student", "teacher"), [(5, 12), (4, 6), (6, 4), (3, 2), (1, 12), (7, 7), (12, 1)])
def test_uniform_is_the_nearest_block_wherever_depths_do_not_divide(student, teacher):
    pairs = full("uniform", HIDDEN, student, teacher)
    assert pairs[0] == (0, 0) and pairs[-1] == (student, teacher) and len(pairs) == student + 1
    for own, theirs in pairs[1:]:
        exact = own * teacher / student
        assert abs(theirs - exact) <= 0.5 or (theirs == 1 and exact < 0.5)
    assert full("uniform", ATTENTIONS, student, teacher) == tuple((a - 1, b - 1) for a, b in pairs[1:])
    assert full("uniform", HIDDEN, 4, 6)[1:] == ((1, 2), (2, 3), (3, 5), (4, 6)), "1.5 and 4.5 are rounded up"


def test_the_last_block_and_pairs_of_ones_own():
    assert full("last", HIDDEN, 4, 12) == ((4, 12),)
    assert full("last", "queries", 4, 12) == ((3, 11),)
    assert full("0:0, 1:2, 1:3", HIDDEN, 4, 12) == ((0, 0), (1, 2), (1, 3))
    assert full("every-3", "attention_scores", 2, 12) == ((0, 2), (1, 5)), "the teacher's last blocks may be left out"
    assert layer_map("1:6", HIDDEN, 2, 12, [0, 6]) == ((1, 6),)


@pytest.mark.parametrize(
    ("text", "kind", "stored", "message"),
    [
        ("5:12", HIDDEN, range(13), r"hidden_states 5:12 .* the student has hidden_states 0 to 4$"),
        ("4:13", HIDDEN, range(13), r"the teacher has hidden_states 0 to 12$"),
        ("4:0", ATTENTIONS, range(12), r"the student has attentions 0 to 3$"),
        ("every-4", HIDDEN, range(13), r"every-4 pairs hidden_states 4:16 .* the teacher has hidden_states 0 to 12$"),
        ("uniform", HIDDEN, [0, 3, 12], r"pairs 2:6 .* teacher_hidden_states_00, _03, _12: .* with layer 6 in --lay"),
        ("last", ATTENTIONS, [2], r"pairs 3:11 .* the store holds teacher_attentions_02: .* layer 12 in --layers"),
        ("last", "queries", [], r"the store holds no teacher_queries"),
        ("0:0,1:2,0:0", HIDDEN, range(13), r"gives 0:0 twice"),
        ("every-0", HIDDEN, range(13), r"'every-0' is not one of uniform, last, tutorial, every-2"),
        ("1-2", HIDDEN, range(13), r"'1-2' is not one of"),
        ("1:2,", HIDDEN, range(13), r"'1:2,' is not one of"),
        ("-1:2", HIDDEN, range(13), r"'-1:2' is not one of"),
        ("", HIDDEN, range(13), r"'' is not one of"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(text, kind, stored, message):
    with pytest.raises(ConfigError, match=message) as caught:
        layer_map(text, kind, 4, 12, stored)
    assert "\n" not in str(caught.value)
