"""A read plan: tensors that move alike are in one batch, and none is taken for one beside it that only looks alike."""

from __future__ import annotations

from collections.abc import Collection

from reshard.catalog import Arrangement, Catalog, Piece, Site, StoredTensor
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from reshard.planning.agreement import Holding, RankDescription, TensorDescription
from reshard.planning.read_plan import Mismatch, ReadPlan, plan_reads
from reshard.state import model_key

FLOAT, HALF = by_name("float32"), by_name("float16")
TOP, BOTTOM = Region((0,), (2,)), Region((2,), (2,))

# The upper half lies in one file, the lower in another, under a name of its own.
CUT = Arrangement(FLOAT, (4,), None, (Piece(TOP, (Site("b", 0),)), Piece(BOTTOM, (Site("a", 0, "@1"),))))
WHOLE = Arrangement(FLOAT, (4,), None, (Piece(Region.whole((4,)), (Site("a", 0),)),))
ALL, LOWER, HALVES = (
    Holding(dtype, (4,), None, (region,)) for dtype, region in ((FLOAT, Region.whole((4,))), (FLOAT, BOTTOM), (HALF, TOP))
)


def planned(casts: Collection[str] = (), **tensors: tuple[Arrangement | None, Holding]) -> ReadPlan:
    stored = {model_key(name): StoredTensor(model_key(name), name, lying) for name, (lying, _) in tensors.items() if lying is not None}
    wanted = tuple(TensorDescription(model_key(name), holding) for name, (_, holding) in tensors.items())
    return plan_reads(RankDescription(0, wanted), Catalog("/c", stored), lambda misfit: misfit.key.parameter in casts)


def moved(plan: ReadPlan) -> list[tuple[str, list[str], int]]:
    return [(batch.movement.site.file, batch.names, batch.movement.nbytes) for batch in plan.batches]


def test_what_moves_alike_is_in_one_batch_wherever_it_stands() -> None:
    plan = planned(u=(CUT, ALL), v=(WHOLE, ALL), w=(CUT, ALL), x=(CUT, LOWER), y=(None, ALL), z=(CUT, ALL))
    assert moved(plan) == [
        ("a", ["u@1", "w@1", "z@1"], 8),
        ("a", ["v"], 16),
        ("a", ["x@1"], 8),
        ("b", ["u", "w", "z"], 8),
    ]
    assert [key.parameter for batch in plan.batches for key in batch.keys] == [*"uwz", "v", "x", *"uwz"]
    assert (plan.nbytes, plan.files) == (3 * 16 + 16 + 8, ("a", "b"))
    assert [key.parameter for key in plan.restored] == [*"uvwxz"]
    assert plan.missing == (model_key("y"),)
    assert [transfer.name for transfer in plan.batches[0].transfers()] == ["u@1", "w@1", "z@1"]


def test_each_tensor_of_another_type_is_asked_about() -> None:
    plan = planned(
        {"v", "y"}, u=(WHOLE, HALVES), v=(WHOLE, HALVES), w=(WHOLE, HALVES), x=(WHOLE, ALL), y=(WHOLE, HALVES), z=(WHOLE, HALVES)
    )
    assert moved(plan) == [("a", ["v", "y"], 8), ("a", ["x"], 16)]
    assert [key.parameter for key in plan.restored] == [*"vxy"]
    assert plan.cast == tuple(Mismatch(model_key(name), "dtype", "float32", "float16") for name in "vy")
    assert [misfit.key.parameter for misfit in plan.mismatched] == [*"uwz"]
