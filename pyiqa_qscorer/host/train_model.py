"""Training a Q-Scorer inside pyiqa's own harness, from a pyiqa YAML.

    model_type: QScorerTrainModel
    network:
      type: QScorer
      checkpoint: folder
      dtype: float32
    train:
      trained_parts: [regressor, lm_head]     # also visual_abstractor, vision_model, decoder
      ...                                     # pyiqa's own settings: optim, losses, scheduler

The loss is what the YAML says, on scores of the differentiable scoring procedure. For the published objective, adapters
and exact resume use `pyiqa-qscorer train`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from pyiqa.losses import build_loss
from pyiqa.models.general_iqa_model import GeneralIQAModel
from pyiqa.utils.registry import MODEL_REGISTRY
from torch import nn

from ..errors import QScorerError
from ..metric import QScorer
from ..model import QScorerForScoring

DEFAULT_PARTS = ("regressor",)


@MODEL_REGISTRY.register()
class QScorerTrainModel(GeneralIQAModel):
    """pyiqa's general model, with one network in memory and only trained weights on disk.

    pyiqa builds the network a second time to remember the best weights; here the best ones are on disk.
    """

    def init_training_settings(self) -> None:
        """Choose the trained parts and set up losses and optimiser as the YAML says.

        Raises:
            QScorerError: another network than `QScorer`, or an unknown part.
        """
        network = self.get_bare_model(self.net)
        if not isinstance(network, QScorer):
            raise QScorerError(f"QScorerTrainModel needs network.type: QScorer, got {type(network).__name__}")
        train = self.opt["train"]
        for name in train.get("trained_parts", DEFAULT_PARTS):
            part_of(network, name).requires_grad_(True)
        self.net.train()
        self.net_best = self.net  # what is validated is what is saved
        self.cri_mos = build_loss(train["mos_loss_opt"]).to(self.device) if train.get("mos_loss_opt") else None
        self.cri_metric = build_loss(train["metric_loss_opt"]).to(self.device) if train.get("metric_loss_opt") else None
        self.setup_optimizers()
        self.setup_schedulers()

    def copy_model(self, net_a: nn.Module, net_b: nn.Module) -> None:
        """Nothing to copy: both are the same network."""

    def save_network(self, net: nn.Module, net_label: str, current_iter: int = -1, param_key: str = "params") -> None:
        """Write the trained parameters, in pyiqa's form, to a temporary name that is then renamed."""
        if self.opt["rank"] != 0:
            return
        step = "latest" if current_iter in (None, -1) else current_iter
        path = os.path.join(self.opt["path"]["models"], f"{net_label}_{step}.pth")
        trained = {
            name: parameter.detach().cpu()
            for name, parameter in self.get_bare_model(net).named_parameters()
            if parameter.requires_grad
        }
        torch.save({param_key: trained}, f"{path}.unfinished")
        os.replace(f"{path}.unfinished", path)

    def load_network(self, net: nn.Module, load_path: str, strict: bool = True, param_key: str = "params") -> None:
        """Read what `save_network` wrote; the frozen weights stay those of the checkpoint.

        Raises:
            QScorerError: the file holds parameters that the network has not.
        """
        saved = torch.load(load_path, map_location="cpu", weights_only=True)[param_key]
        unexpected = self.get_bare_model(net).load_state_dict(saved, strict=False).unexpected_keys
        if unexpected:
            raise QScorerError(f"{load_path} does not fit the network: it has no {', '.join(unexpected[:5])}")


def part_of(network: QScorer, name: str) -> nn.Module:
    """A part of the network by the name that the YAML uses."""
    model: Any = network.network
    parts = {"regressor": model.deepmlp}
    if isinstance(model, QScorerForScoring):
        parts |= {
            "lm_head": model.lm_head,
            "visual_abstractor": model.model.visual_abstractor,
            "vision_model": model.model.vision_model,
            "decoder": model.model.layers,
        }
    if name not in parts:
        raise QScorerError(f"trained_parts must be among {', '.join(parts)}, got {name!r}")
    return parts[name]
