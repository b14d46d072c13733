"""Model card of a trained checkpoint: the facts of the run in words, under the header that the Hub reads."""

from __future__ import annotations

import re
from typing import Any

from ..registry import BACKBONES


def _start(model: dict[str, Any]) -> str:
    if model["backbone"]:
        return str(model["backbone"])
    if model["checkpoint"]:
        return str(model["checkpoint"])
    pretrained = ", then ".join(model["backbone_weights"])
    return f"new network, its feature network from {pretrained}" if pretrained else "new network"


def model_card(facts: dict[str, Any], layout: str) -> str:
    """`README.md` of a checkpoint folder from the content of its `training.json`."""
    configuration = facts["configuration"]
    model = configuration["model"]
    backbone = BACKBONES.get(model["backbone"], model["backbone"]) or ""
    lines = [
        "---",
        f"library_name: {'peft' if backbone else 'pyiqa-qscorer'}",
        "pipeline_tag: image-text-to-text",
        "tags: [image-quality-assessment, qscorer]",
        *([f"base_model: {backbone}"] if re.fullmatch(r"\w[\w.-]*/[\w.-]+", backbone) else []),
        "---",
        "",
        "# Q-Scorer checkpoint",
        "",
        f"Trained with pyiqa-qscorer {facts['versions']['pyiqa-qscorer']}; layout `{layout}`.",
        "",
        f"- start: {_start(model)}",
        f"- formulation: {model['formulation']}, {model['levels']} levels, regressor {model['regressor']}",
        f"- steps: {facts['steps']} on {facts['device']}, {facts['processes']} process(es), seed "
        f"{configuration['training']['seed']}",
        "",
        "## Data",
        "",
        "| dataset | role | images | left out | MOS scale | lower is better | weight |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for role, parts in facts["data"].items():
        for part in parts:
            low, high = part["mos_range"]
            lines.append(
                f"| {part['dataset']} | {role} | {part['images']} | {part['skipped']} | {low:g} to {high:g} | "
                f"{'yes' if part['lower_better'] else 'no'} | {part['weight']:g} |"
            )
    lines += ["", "Every scale was mapped linearly to 1 (worst) .. 5 (best).", "", "## Validation", ""]
    measured = {
        name.removeprefix("validation_"): value
        for name, value in facts["metrics"].items()
        if name.removeprefix("validation_") in ("srcc", "plcc", "krcc", "rmse")
    }
    if measured:
        lines += ["| SRCC | PLCC | KRCC | RMSE |", "| --- | --- | --- | --- |"]
        lines.append("| " + " | ".join(f"{measured[name]:.4f}" for name in ("srcc", "plcc", "krcc", "rmse")) + " |")
    else:
        lines.append("Not measured: the run had no validation data.")
    lines += ["", "Configuration, versions and curves: `training.json`.", ""]
    use = 'metric = pyiqa.create_metric("qscorer", checkpoint="this folder or its Hub id")'
    lines += ["## Use", "", "```python", "import pyiqa  # with pyiqa-qscorer installed", "", use, "```", ""]
    return "\n".join(lines)
