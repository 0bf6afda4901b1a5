"""What a load does about tensors that don't fit: by kind, by name, and in the report."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import MismatchError, UsageError
from reshard.loading.report import RankReport, RestoreReport
from reshard.state import model_key, slot_key
from reshard.testing import run_ranks, run_ranks_settled

STORED = {"body.weight": np.ones(4, np.float32), "head.weight": np.ones(4, np.float32), "old.weight": np.ones(2, np.float32)}


def run() -> dict[str, np.ndarray]:
    """`body` fits; `head` has another shape, `new` is missing, `old` is unexpected."""
    return {"body.weight": np.zeros(4, np.float32), "head.weight": np.zeros(5, np.float32), "new.bias": np.zeros(1, np.float32)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    reshard.save(tmp_path, 1, model=STORED)
    return tmp_path


RULES: dict[str, Any] = {"new.*": {"missing": "ignore"}, "head.*": {"shape": "ignore"}, "old.*": {"unexpected": "ignore"}}


@pytest.mark.parametrize("left_out", [None, *RULES], ids=str)
def test_a_rule_holds_for_its_kind_and_names_only(left_out: str | None, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    strict = reshard.Strictness(unexpected="error", rules={pattern: rule for pattern, rule in RULES.items() if pattern != left_out})
    model = run()
    if left_out is not None:
        with pytest.raises(MismatchError) as caught:
            reshard.load(root, model=model, strict=strict)
        assert caught.value.tensor is not None
        assert caught.value.tensor.startswith(left_out.rstrip("*"))
        assert not model["body.weight"].any()
        return
    with caplog.at_level(logging.WARNING, "reshard"):
        report = reshard.load(root, model=model, strict=strict)
    assert not caplog.records
    assert (report.restored, report.missing) == (("body.weight",), ("new.bias",))
    assert (report.mismatched, report.unexpected) == (("head.weight",), ("old.weight",))
    assert model["body.weight"].all()
    assert not model["head.weight"].any()


def test_the_last_rule_that_says_something_counts() -> None:
    strict = reshard.Strictness(
        missing="warn",
        rules={
            "*": {"missing": "error", "dtype": "cast"},
            "a.*": {"missing": "ignore"},
            "a.b.*": {"shape": "warn"},
            "a.b.c": {"missing": "error"},
        },
    )
    assert [strict.action("missing", model_key(name)) for name in ("x", "a.x", "a.b.x", "a.b.c")] == ["error", "ignore", "ignore", "error"]
    assert strict.action("shape", model_key("a.b.x")) == "warn"
    assert strict.action("shape", model_key("a.x")) == "error"
    assert strict.action("dtype", model_key("a.b.c")) == "cast"
    # A parameter's pattern means its moments too; a slot's means that slot.
    moment = slot_key("adam_v", "a.x")
    assert strict.action("missing", moment) == "ignore"
    assert reshard.Strictness(rules={"adam_m.*": {"missing": "warn"}}).action("missing", moment) == "error"


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({"missing": "skip"}, "missing", "error, warn, ignore"),
        ({"missing": "cast"}, "missing", "error, warn, ignore"),
        ({"dtype": "convert"}, "dtype", "error, warn, ignore, cast"),
        ({"rules": {"a.*": {"mising": "warn"}}}, "rules['a.*']", "missing, unexpected, shape, dtype"),
        ({"rules": {"a.*": {"shape": "cast"}}}, "rules['a.*'], shape", "error, warn, ignore"),
        ({"rules": {"a.*": {1: "warn"}}}, "rules['a.*']", "missing, unexpected, shape, dtype"),
        ({"rules": {"a.*": "warn"}}, "rules['a.*']", "{'missing': 'ignore'}"),
        ({"rules": [("a.*", {"missing": "warn"})]}, "rules", "'lm_head.*'"),
        ({"rules": {"a.*": {"missing": ["warn"]}}}, "rules['a.*'], missing", "error, warn, ignore"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused_by_name(given: dict[str, Any], field: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        reshard.Strictness(**given)
    assert caught.value.field == field
    assert expected in str(caught.value.expected)


def test_what_was_checked_stays() -> None:
    rules: dict[str, Any] = {"a.*": {"missing": "warn"}}
    strict = reshard.Strictness(rules=rules)
    rules["a.*"]["missing"] = "nonsense"
    rules["b"] = {}
    assert strict == reshard.Strictness(rules={"a.*": {"missing": "warn"}})
    assert hash(strict) == hash(reshard.Strictness(rules={"a.*": {"missing": "warn"}}))


def test_errors_come_before_warnings_and_name_their_tensors_only(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = {**run(), "new.weight": np.zeros(1, np.float32), "new.scale": np.zeros(1, np.float32)}
    strict = reshard.Strictness(shape="ignore", rules={"new.bias": {"missing": "warn"}, "new.scale": {"missing": "ignore"}})
    with caplog.at_level(logging.WARNING, "reshard"), pytest.raises(MismatchError, match="1 tensor of the run is not") as caught:
        reshard.load(root, model=model, strict=strict)
    assert caught.value.tensor == "new.weight"
    assert not caplog.records
    del model["new.weight"]
    with caplog.at_level(logging.WARNING, "reshard"):
        report = reshard.load(root, model=model, strict=strict)
    assert ["new.bias" in record.message for record in caplog.records] == [True, False]
    assert "old.weight" in caplog.records[1].message
    assert report.missing == ("new.bias", "new.scale")


def test_a_checkpoint_without_the_optimizer(tmp_path: Path) -> None:
    reshard.save(tmp_path, 1, model={"a.w": np.ones(2)})
    moments = {"adam_m.a.w": np.zeros(2), "adam_v.a.w": np.zeros(2)}
    with pytest.raises(MismatchError, match="no optimizer state"):
        reshard.load(tmp_path, model={"a.w": np.zeros(2)}, optimizer=moments)
    with pytest.raises(MismatchError, match="no optimizer state") as caught:
        reshard.load(
            tmp_path, model={"a.w": np.zeros(2)}, optimizer=moments, strict=reshard.Strictness(rules={"adam_m.*": {"missing": "warn"}})
        )
    assert caught.value.expected == "1 optimizer tensors"
    strict = reshard.Strictness(rules={"adam_?.*": {"missing": "ignore"}})
    report = reshard.load(tmp_path, model={"a.w": np.zeros(2)}, optimizer=moments, strict=strict)
    assert report.missing == ("adam_m.a.w", "adam_v.a.w")


def test_every_rank_judges_alike(root: Path) -> None:
    def load(comm: Communicator, strict: reshard.Strictness) -> RestoreReport:
        # Only rank 1 wants what is missing.
        model = {"body.weight": np.zeros(4, np.float32)} | ({"new.bias": np.zeros(1)} if comm.rank else {})
        return reshard.load(root, model=model, communicator=comm, strict=strict)

    for outcome in run_ranks_settled(2, lambda comm: load(comm, reshard.Strictness())):
        assert isinstance(outcome, MismatchError)
        assert "new.bias" in str(outcome)
    reports = run_ranks(2, lambda comm: load(comm, reshard.Strictness(rules={"new.*": {"missing": "ignore"}})))
    assert [report.missing for report in reports] == [("new.bias",)] * 2
    assert reports[0].unexpected == ("head.weight", "old.weight")


def test_the_report_as_a_table(root: Path) -> None:
    def load(comm: Communicator) -> RestoreReport:
        model = {"body.weight": np.zeros(4, np.float16), "head.weight": np.zeros(5, np.float32), "new.bias": np.zeros(1, np.float32)}
        strict = reshard.Strictness(dtype="cast", shape="ignore", rules={"new.*": {"missing": "ignore"}})
        return reshard.load(root, model=model, communicator=comm, strict=strict, exclude="old.*")

    report, other = run_ranks(2, load)
    assert report == other
    title, _, kinds, numbers, _, columns, *rows = report.table().splitlines()
    assert title.startswith(f"iteration 1 of {report.directory}: loaded in ")
    counts = dict(zip(kinds.split(), numbers.split(), strict=True))
    assert counts == {"restored": "1", "cast": "1", "filled": "0", "missing": "1", "unexpected": "0", "mismatched": "1", "skipped": "1"}
    timed = ["open s", "plan s", "read s", "install s"]
    assert re.split(r"\s{2,}", columns.strip()) == ["rank", "needed", "read", "verified", "unverified", *timed]
    assert [row.split()[:9] for row in rows[:3]] == [
        ["0", "16", "B", "16", "B", "16", "B", "0", "B"],
        ["1", "16", "B", "16", "B", "16", "B", "0", "B"],
        ["all", "32", "B", "32", "B", "32", "B", "0", "B"],
    ]
    for rank in report.ranks:
        assert list(rank.seconds) == ["open", "plan", "read", "install"]
        assert all(rank.seconds[phase] > 0 for phase in ("open", "plan", "read"))
        assert rank.seconds["install"] == 0, "these tensors are all that there is"
    assert max(sum(rank.seconds.values()) for rank in report.ranks) <= report.seconds
    assert rows[3:] == [
        "",
        "cast: body.weight: float32 -> float16",
        "",
        "missing: new.bias",
        "",
        "mismatched: head.weight",
        "",
        "skipped: old.weight",
    ]
    assert str(report).count("\n") == 0


def test_a_table_of_many_ranks_and_names_stays_short() -> None:
    ranks = tuple(RankReport(rank, 1000, 2000, {"read": 0.5 + rank, "warm": 1.0}, bytes_verified=500) for rank in range(5000))
    names = tuple(f"w{number}" for number in range(100))
    report = RestoreReport("/there", None, names, (), (), names, (), "untouched", ranks, None, notes=("mind this",))
    lines = report.table().splitlines()
    assert len(lines) < 35
    assert lines[0].startswith("/there: loaded in")
    assert lines[6].split() == ["0", "1", "KB", "2", "KB", "500", "B", "1.5", "KB", "0.500", "1.000"]
    assert lines[22].split() == ["all", "5", "MB", "10", "MB", "2.5", "MB", "7.5", "MB", "4999.500", "1.000"]
    assert lines[23] == "(4984 more ranks are in `ranks`)"
    assert lines[-3].startswith("unexpected: w0, ")
    assert lines[-3].endswith("w7, … (100 in all)")
    assert lines[-1] == "note: mind this"
