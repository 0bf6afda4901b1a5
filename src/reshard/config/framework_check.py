"""What the reference trainer can't do under MindSpore."""

from __future__ import annotations

from reshard.config.document import Document
from reshard.config.fields import RunConfig
from reshard.errors import ConfigError

# Fields that must keep a value under MindSpore, and why.
_FIXED: tuple[tuple[tuple[str, ...], object, str], ...] = (
    (("model", "model_type"), "qwen3", "it has the dense model only"),
    (("model", "attention_bias"), False, "the family's MindSpore names have no bias"),
    (("model", "attention_dropout"), 0.0, "the random numbers of MindSpore's dropout can't be kept in a checkpoint"),
    (("parallel_config", "model_parallel"), 1, "it is data parallel only"),
    (("parallel_config", "pipeline_stage"), 1, "it is data parallel only"),
    (("parallel", "enable_parallel_optimizer"), False, "every rank keeps the whole optimizer"),
)


def check_framework(run: RunConfig, document: Document) -> None:
    """Check that the framework of a run can train it.

    Raises:
        ConfigError: naming the first field that it can't.
    """
    if run.framework != "mindspore":
        return
    for path, only, why in _FIXED:
        section, name = path
        given = getattr(getattr(run, section), name)
        if given != only:
            raise ConfigError(
                f"the reference trainer can't do this under MindSpore: {why}",
                file=document.where(path),
                field=".".join(path),
                found=given,
                expected=f"{only}, with framework: mindspore",
                fix="take the line out, or set framework: torch; what this run saves can be loaded there",
            )
