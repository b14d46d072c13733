"""The network as a transformers model: saving, loading, copies, checkpointing, peft, compiling, the published 7B."""

import copy
import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import (
    build,
    small_inputs,
    table,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from pyiqa_qscorer.model import QScorerConfig, QScorerForScoring

PEFT_TARGETS = r".*\.self_attn\.(q_proj|v_proj\.multiway\.1)"


def logits_of(model: QScorerForScoring) -> Tensor:
    with torch.no_grad():
        return model(*small_inputs()).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build("S", "sdpa").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 5
    return folder


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_saved_and_loaded_bit_for_bit(saved: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model, report = QScorerForScoring.from_pretrained(saved, output_loading_info=True, **options)
    assert not any(report.values()), report
    original = build("S", "sdpa")
    assert model.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(logits_of(model), logits_of(original))
    assert model.config.to_dict()["score_token_ids"] == [315, 316, 317, 318, 319]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()  # one file loads like shards
    assert torch.equal(logits_of(QScorerForScoring.from_pretrained(tmp_path)), logits_of(original))


def test_forward_gives_what_transformers_models_give() -> None:
    """`.loss` with labels, all hidden states, a tuple instead of names."""
    model, (ids, pixels) = build("S", "sdpa"), small_inputs()
    plain = model(ids, pixels)
    assert plain.loss is None and plain.hidden_states is None
    labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 4, ids, -100)
    found = model(ids, pixels, labels=labels, output_hidden_states=True)
    assert torch.equal(found.logits, plain.logits)
    shifted = found.logits[:, :-1].flatten(0, 1), found.labels[:, 1:].flatten()
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(*shifted, ignore_index=-100))
    found.loss.backward()
    assert model.lm_head.weight.grad.isfinite().all()
    assert len(found.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    assert all(states.shape == found.last_hidden_state.shape for states in found.hidden_states)
    as_tuple = model(ids, pixels, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], found.loss)
    assert model(ids, pixels, labels=torch.full_like(ids, -100)).loss is None


def test_copies_and_attention_of_the_visual_parts(saved: Path) -> None:
    def used(model: QScorerForScoring) -> set[str | None]:
        parts = (model.config, model.config.vision_config, model.config.abstractor_config)
        return {part._attn_implementation for part in parts}

    assert used(QScorerForScoring.from_pretrained(saved)) == {"sdpa"}
    assert used(QScorerForScoring.from_pretrained(saved, attn_implementation="eager")) == {"eager"}
    model = QScorerForScoring(QScorerConfig.from_pretrained(saved))
    assert used(model) == {"sdpa"}
    model = build("S", "sdpa")
    expected = logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(logits_of(other), expected)
            other.lm_head.weight.zero_()
        assert torch.equal(logits_of(model), expected)


def test_nothing_is_left_uninitialised_where_keys_are_missing(tmp_path: Path) -> None:
    """Loading builds on the meta device, so every bare parameter and buffer must be filled by `_init_weights`."""
    model = build("S")
    state = model.state_dict()
    norms = ("norm.weight", "norm.bias", "norm1.weight", "normk.bias", "norm2.weight", "ffn_ln.weight")
    bare = ("query_embeds", "vit_eos", "cls_token", "position_embedding", "pos_embed")
    missing = {name for name in state if name.endswith((*norms, *bare)) or "deepmlp" in name or "layers.1." in name}
    model.config.save_pretrained(tmp_path)
    kept = {name: tensor for name, tensor in state.items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(0)  # of the 16 values of the smallest layer, too few for any seed
    loaded, report = QScorerForScoring.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    own_tables = model.model.visual_abstractor.encoder.layers[0].crossattention.attention.position_tables()
    for name, tensor in loaded.state_dict().items():
        if name not in missing:
            assert torch.equal(tensor, state[name]), name
        elif name.endswith("pos_embed"):
            assert torch.equal(tensor, own_tables["k_pos" in name]), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        elif tensor.ndim == 1:
            assert (tensor == 1).all(), name
        else:  # N(0, 0.02), as transformers leaves the published regressor
            assert 0.01 < tensor.std() < 0.03, name
            assert tensor.abs().max() < 0.12, name
    assert logits_of(QScorerForScoring(model.config).eval()).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in later transformers
def test_gradient_checkpointing_gives_equal_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build("S", "sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(*small_inputs()).logits.square().mean().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_peft_targets_are_the_published_ones_and_train() -> None:
    base = build("S", "sdpa")
    expected = logits_of(base)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=PEFT_TARGETS))
    adapted = {name.removesuffix(".lora_A.default.weight") for name, _ in model.named_parameters() if "lora_A" in name}
    published = table("lora_golden/find_all_linear_names_tiny")  # two layers, as model S has
    assert adapted == {f"base_model.model.{name}" for name in published}
    with torch.no_grad():
        assert torch.equal(model(*small_inputs()).logits, expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        ids, pixels = small_inputs()
        loss = (model(input_ids=ids, pixel_values=pixels).logits[:, -1] - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    assert isinstance(merged, QScorerForScoring)
    assert merged.state_dict().keys() == build("S").state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_full_size_has_the_published_keys_shapes_and_parameters() -> None:
    path = Path(__file__).parent / "golden" / "full_size" / "state_dict_keys.json.gz"
    stored, counts = json.loads(gzip.decompress(path.read_bytes())), table("full_size/counts")
    with torch.device("meta"):
        model = QScorerForScoring(QScorerConfig.from_published(stored["config"]))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 868 == counts["n_state_dict_keys"]
    assert shapes == {name: list(shape) for name, shape in stored["state_dict"].items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_208_390_145 == counts["total_parameters"]
    assert [name for name, _ in model.named_buffers()] == counts["persistent_buffers"]
    published, ours = model.config, QScorerConfig()  # the defaults
    for part in ("vision_config", "abstractor_config"):
        assert getattr(ours, part).to_dict() == getattr(published, part).to_dict()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(ours, name) == getattr(published, name)
    assert ours.regressor_hidden_sizes == published.regressor_hidden_sizes == [2048, 1024]
    with torch.device("meta"):
        model = get_peft_model(model, LoraConfig(r=128, target_modules=PEFT_TARGETS))
    lora = {name: p.numel() for name, p in model.named_parameters() if "lora_" in name}
    adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in lora}
    assert adapted == set(stored["find_all_linear_names"])
    assert sum(lora.values()) == counts["lora_r128_trainable"]


def test_a_derived_configuration_has_the_fields_of_its_base() -> None:
    class Derived(QScorerConfig):
        model_type = "derived"
        extra: int = 3

        def __init__(self, **kwargs: Any) -> None:  # without one, transformers makes its own
            super().__init__(**kwargs)

    config = Derived(hidden_size=8, num_attention_heads=2, extra=4)
    assert (config.hidden_size, config.extra, config.prompt, config.regressor_hidden_sizes) == (
        8,
        4,
        "score",
        [2048, 1024],
    )
