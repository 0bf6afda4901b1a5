"""The tracker and `common.json`."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import MetadataError, TrackerError
from reshard.format.common import CommonInfo, decode_common, encode_common
from reshard.format.tracker import decode_tracker, encode_tracker
from tests.golden import CASES, iteration, root

_counts = st.none() | st.integers(0, 2**63 - 1)


@pytest.mark.parametrize("case", CASES)
def test_golden_trackers(case):
    data = (root(case) / "latest_checkpointed_iteration.txt").read_bytes()
    assert decode_tracker(data, "tracker") == 1
    assert encode_tracker(1) == data


@pytest.mark.parametrize("data", [b"12\n", b"  12  ", b"00000012", b"\t12\r\n"])
def test_an_edited_tracker(data):
    assert decode_tracker(data, "tracker") == 12


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n ",
        b"iteration_00000012",
        b"-1",
        b"1.0",
        b"1 2",
        b"0x1",
        b"\xef\xbb\xbf12",
        b"\xff\xfe1\x002\x00",
        b"9" * 5000,
        "１２".encode(),
    ],
)
def test_a_tracker_that_names_no_iteration(data):
    with pytest.raises(TrackerError) as caught:
        decode_tracker(data, "/root/latest_checkpointed_iteration.txt")
    assert caught.value.file == "/root/latest_checkpointed_iteration.txt"
    assert "number" in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("case", CASES)
def test_golden_common_information_is_written_byte_for_byte(case):
    data = (iteration(case) / "common.json").read_bytes()
    info = decode_common(data, "common.json")
    assert (info.epoch_num, info.step_num, info.global_step, info.global_batch_size) == (1, 1, 1, 4)
    assert encode_common(info) == data


@given(st.builds(CommonInfo, *[_counts] * 3, st.none() | st.floats(allow_nan=False, allow_infinity=False), *[_counts] * 3))
def test_common_information_comes_back(info):
    data = encode_common(info)
    assert decode_common(data, "common.json") == info
    assert list(json.loads(data)) == [
        "epoch_num",
        "step_num",
        "global_step",
        "loss_scale",
        "global_batch_size",
        "consumed_samples",
        "ckpt_status",
    ]


def test_missing_keys_are_none_and_unknown_ones_are_left_out():
    assert decode_common(b'{"step_num": 3, "data_plan_state": {"a": 1}}', "common.json") == CommonInfo(step_num=3)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "unexpected value"),
        (b'{"step_num": "3"}', "step_num"),
        (b'{"step_num": -3}', "step_num"),
        (b'{"step_num": 1.5}', "step_num"),
        (b'{"step_num": 9223372036854775808}', "step_num"),
        (b'{"loss_scale": NaN}', "not JSON"),
        (b'\xef\xbb\xbf{"step_num": 3}', "byte-order mark"),
        (b"\xff\xfe{\x00", "byte-order mark"),
        (b'{"step_num": 3, "x": "\xff"}', "UTF-8"),
        (b'{"x": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_damaged_common_information(data, said):
    with pytest.raises(MetadataError, match=said) as caught:
        decode_common(data, "/root/iteration_00000001/common.json")
    assert caught.value.file == "/root/iteration_00000001/common.json"
