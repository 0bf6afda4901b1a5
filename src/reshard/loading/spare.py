"""What published weights have and a run may well lack: repetitions of tied tensors, and layers that predict further tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from reshard.catalog import Catalog
from reshard.format.names import tensor_name
from reshard.loading.strictness import Misfits
from reshard.planning.mapping.mappers import further_layers, sizes_in, tied_in
from reshard.state import Kind, TensorKey


@dataclass(frozen=True)
class Spare:
    """What of a checkpoint a run may well lack. Where it does, a note says so, and it isn't unexpected.

    Attributes:
        tied: tensors that only repeat others, with these.
        layers: by number, the tensors of layers that predict further tokens.
    """

    tied: Mapping[TensorKey, TensorKey] = field(default_factory=dict)
    layers: Mapping[int, frozenset[TensorKey]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, catalog: Catalog) -> Spare:
        """What there is of it in a checkpoint.

        Args:
            config: the model's description; None when there is none.
            catalog: what the checkpoint holds, in its own names.
        """
        layers: dict[int, frozenset[TensorKey]] = {}
        for number, layer in enumerate(further_layers(sizes_in(config))):
            places = (f"model.layers.{layer}.", f"mtp.layers.{number}.")
            held = frozenset(key for key in catalog.tensors if key.kind is Kind.MODEL and key.parameter.startswith(places))
            if held:
                layers[layer] = held
        return cls(tied_in(config, catalog), layers)

    def sift(self, misfits: Misfits, ignored: Collection[TensorKey]) -> tuple[Misfits, tuple[str, ...]]:
        """The misfits without what is spare, and notes about it. Of a layer that the run has in part, what it lacks stays unexpected.

        Args:
            misfits: of the whole job, in the checkpoint's names.
            ignored: tensors that a mapping has left out already.
        """
        unread = {*misfits.unexpected, *ignored}
        skipped = {layer: keys for layer, keys in self.layers.items() if unread >= keys}
        of_layers = frozenset[TensorKey]().union(*skipped.values())
        repeated = [key for key in self.tied if key in unread and key not in of_layers]
        notes = [
            f"{tensor_name(key)} was not read: it is {tensor_name(self.tied[key])}, as the configuration says"
            + ("" if any(key in keys for keys in self.layers.values()) else " (tie_word_embeddings)")
            for key in repeated
        ]
        notes += [
            f"layer {layer} predicts further tokens (num_nextn_predict_layers), which the run hasn't: {len(keys)} tensors were not read"
            for layer, keys in skipped.items()
        ]
        left = tuple(key for key in misfits.unexpected if key not in of_layers and key not in repeated)
        return replace(misfits, unexpected=left), tuple(notes)
