"""Hyper-parameters by parameter name, whichever rank and group they come from."""

from __future__ import annotations

import numpy as np
import pytest

from reshard.errors import CaptureError
from reshard.format.extra import FrameworkArray
from reshard.saving.groups import encode_options, merge_groups
from reshard.state import ParameterGroup


def merged(*ranks: tuple[ParameterGroup, ...]) -> list[ParameterGroup]:
    options = [encode_options(groups) for groups in ranks]
    members = [[(list(group.parameters), list(group.unstepped)) for group in groups] for groups in ranks]
    return merge_groups(options, members)


DECAY, NONE = {"lr": 0.1, "weight_decay": 0.01, "betas": (0.9, 0.999)}, {"lr": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.999)}


def test_stages_see_parts_of_the_same_groups():
    first = (ParameterGroup(DECAY, ("a.w", "b.w")), ParameterGroup(NONE, ("a.b",)))
    second = (ParameterGroup(NONE, ("c.b",)), ParameterGroup(dict(DECAY), ("c.w",)))
    assert merged(first, first, second, second) == [ParameterGroup(DECAY, ("a.w", "b.w", "c.w")), ParameterGroup(NONE, ("a.b", "c.b"))]


def test_groups_of_one_rank_with_equal_options_are_one():
    assert merged((ParameterGroup({"lr": 1.0}, ("a",)), ParameterGroup({"lr": 1.0}, ("b",)))) == [ParameterGroup({"lr": 1.0}, ("a", "b"))]


def test_options_that_differ_in_type_are_not_equal():
    groups = merged((ParameterGroup({"lr": 1.0}, ("a",)), ParameterGroup({"lr": 1}, ("b",)), ParameterGroup({"lr": np.float32(1)}, ("c",))))
    assert [group.parameters for group in groups] == [("a",), ("b",), ("c",)]
    assert [type(group.options["lr"]) for group in groups] == [float, int, np.float32]


def test_arrays_travel():
    learning_rate = FrameworkArray("torch", "float32", np.array(0.5, np.float32))
    groups = merged(
        (ParameterGroup({"lr": learning_rate, "x": np.arange(6).reshape(2, 3).T}, ("a",)),),
        (ParameterGroup({"lr": FrameworkArray("torch", "float32", np.array(0.5, np.float32)), "x": np.arange(6).reshape(2, 3).T}, ("b",)),),
    )
    (group,) = groups
    assert group.parameters == ("a", "b")
    assert group.options["lr"] == learning_rate
    assert np.array_equal(group.options["x"], np.arange(6).reshape(2, 3).T)


def test_a_parameter_is_in_one_group_and_unstepped_when_all_say_so():
    first = (ParameterGroup({"lr": 1.0}, ("a", "b", "c"), ("b", "c")),)
    second = (ParameterGroup({"lr": 2.0}, ("b", "c", "d"), ("c", "d")),)
    assert merged(first, second) == [
        ParameterGroup({"lr": 1.0}, ("a", "b", "c"), ("c",)),
        ParameterGroup({"lr": 2.0}, ("d",), ("d",)),
    ]


def test_a_group_without_parameters_is_no_group():
    assert merged((ParameterGroup({"lr": 1.0}, ()),), ()) == []


def test_an_option_that_can_not_be_saved():
    with pytest.raises(CaptureError, match="can't hold"):
        encode_options((ParameterGroup({"lr": object()}, ("a",)),))
