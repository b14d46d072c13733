"""Every part of the network against the published one: stage by stage, and with mistakes made on purpose."""

import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from golden_data import (
    IMAGE_NAMES,
    build,
    check,
    check_mistake,
    check_small,
    pixel_values,
    positions,
    recorded,
    run_small,
    small_inputs,
    tensors,
)
from torch import Tensor, nn
from torch.nn.functional import gelu

from pyiqa_qscorer.model import QScorerForScoring, language
from pyiqa_qscorer.model.abstractor import CrossAttention, CrossAttentionBlock
from pyiqa_qscorer.model.attention import attend, split_heads
from pyiqa_qscorer.model.language import RMSNorm
from pyiqa_qscorer.model.multiway import VisualSpan
from pyiqa_qscorer.model.regressor import RegressorBlock

PREFIX = [1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13]


def layers(golden: str, ours: str, parts: dict[str, str]) -> dict[str, str]:
    return {f"{golden}{i}{name}": f"{ours}.{i}{path}" for i in range(2) for name, path in parts.items()}


VISION, ABSTRACTOR, DECODER = "model.vision_model", "model.visual_abstractor", "model.layers"
PATHS = {
    "vision.patch_conv": f"{VISION}.embeddings.patch_embed",
    "vision.embeddings_after_pre_layernorm": f"{VISION}.embeddings",
    "vision.last_hidden_state": VISION,
    **layers("vision.layer", f"{VISION}.encoder.layers", {"": "", ".self_attn_out": ".self_attn", ".mlp_out": ".mlp"}),
    "abstractor.visual_fc": f"{ABSTRACTOR}.visual_fc",
    "abstractor.last_hidden_state": ABSTRACTOR,
    **layers(
        "abstractor.layer",
        f"{ABSTRACTOR}.encoder.layers",
        {
            **{"": "", ".attention_context": ".crossattention.attention", ".mlp_out": ".crossattention.output.mlp"},
            **{f".{norm}": f".crossattention.{norm}" for norm in ("norm1", "normk")},
        },
    ),
    **layers(
        "llm.layer",
        DECODER,
        {
            **{"": "", ".input_layernorm": ".input_layernorm", ".self_attn_out": ".self_attn", ".mlp_out": ".mlp"},
            **{f".{part}_proj": f".self_attn.{part}_proj" for part in "qkv"},
        },
    ),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "count"), [("S", 35), ("E", 9)])
def test_every_stage_equals_the_published_one(name: str, count: int, attention: str) -> None:
    outputs, golden = run_small(build(name, attention), PATHS), tensors(f"model_{name}/golden")
    stages = [stage for stage in PATHS if f"fwd.{stage}" in golden]
    assert len(stages) == count
    check_small(name, outputs, [*stages, "llm.final_hidden", "logits"])
    scores = golden["fwd.deepmlp_all_positions"]  # most positions are no score positions: up to 110
    check(outputs["deepmlp_all_positions"], scores, tolerance=5e-4, what="scores")
    with torch.no_grad():
        check(build(name).deepmlp(golden["fwd.llm.final_hidden"]), scores, what="scores of the published states")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden_images_give_the_published_patch_and_visual_tokens(attention: str) -> None:
    model, golden = build("T", attention), tensors("model_T/golden")
    with torch.no_grad(), recorded(model, {"patches": VISION, "embeddings": f"{VISION}.embeddings"}) as seen:
        tokens = model.model.encode_images(pixel_values())
    sample = positions((1025, 48), 1500, "vision")
    for row, image in enumerate(IMAGE_NAMES):
        check(seen["patches"][row].flatten()[sample], golden[f"single.{image}.vision_sub"], what=image)
        check(tokens[row], golden[f"single.{image}.abstractor"], what=image)
    check(seen["patches"][0], golden["full.a.vision_last_hidden"], what="all tokens of image a")
    embeddings = seen["embeddings"][0].flatten()[positions((1025, 48), 3000, "visemb")]
    check(embeddings, golden["full.a.vision_embeddings_sub"], what="embeddings of image a")


def test_merged_sequence_equals_the_published_one() -> None:
    """Text embeddings around the visual tokens, and which columns count as visual."""
    model, golden = build("S"), tensors("model_S/golden")
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        output = model(*small_inputs())
    check(seen[0], golden["fwd.llm.inputs_embeds"], what="inputs_embeds")
    indicator = torch.zeros(output.logits.shape[:2], dtype=torch.long)
    indicator[:, slice(*output.visual_span)] = 1
    assert torch.equal(indicator, golden["fwd.llm.modality_indicators"])


def test_intermediate_states_of_a_golden_image_equal_the_published_ones() -> None:
    """Both published passes over image a: 92 tokens, then 93 with the token that the first one chose."""
    model, golden = build("T"), tensors("model_T/golden")
    assert golden["full.a.modality_indicators1"].nonzero().flatten().tolist() == list(range(15, 80))
    with torch.no_grad():
        visual = model.model.encode_images(pixel_values()[:1])
        for step in (1, 2):
            states = golden[f"full.a.inputs_embeds{step}"][None]
            check(visual[0], states[0, 15:80], what="visual tokens")
            check(states[0, :15], model.model.embed_tokens(torch.tensor(PREFIX)), what="text before the image")
            with recorded(model, {f"llm_layer{index}": f"{DECODER}.{index}" for index in range(3)}) as seen:
                final = model.model.decode(states, VisualSpan(15, 80))
            for layer, out in seen.items():
                check(out[0], golden[f"full.a.{layer}_step{step}"], what=f"{layer} of pass {step}")
            check(final[0], golden[f"full.a.final_hidden_step{step}"], what=f"pass {step}")


Mistake = Callable[[QScorerForScoring], None]


def each(pattern: str, change: Callable[[Any], object], kind: type[nn.Module] = nn.Module) -> Mistake:
    """Change every module of the kind whose name matches."""

    def make(model: QScorerForScoring) -> None:
        for name, module in list(model.named_modules()):
            if re.search(pattern, name) and isinstance(module, kind):
                change(module)

    return make


def put(**values: Any) -> Callable[[nn.Module], None]:
    return lambda module: [setattr(module, name, value) for name, value in values.items()]


def forward(function: Callable[..., Tensor]) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, "forward", MethodType(function, module))


def swap(first: str, second: str) -> Callable[[nn.Module], None]:
    return lambda module: put(**{first: getattr(module, second), second: getattr(module, first)})(module)


def text_way_only(module: Any) -> None:
    module.multiway[1] = module.multiway[0]


def qkv_in_three_blocks(attention: Any) -> None:
    for tensor in (attention.query_key_value.weight, attention.query_key_value.bias):
        tensor.data = tensor.data.unflatten(0, (3, attention.heads, -1)).transpose(0, 1).flatten(0, 2)


def cls_after_patches(embeddings: Any, pixels: Tensor) -> Tensor:
    patches = embeddings.patch_embed(pixels).flatten(2).transpose(1, 2)
    tokens = torch.cat([patches, embeddings.cls_token.expand(len(patches), -1, -1)], dim=1)
    return embeddings.pre_layernorm(tokens + embeddings.position_embedding)


def residual_before_the_norm(block: CrossAttentionBlock, queries: Tensor, image_tokens: Tensor) -> Tensor:
    normed = block.norm1(queries)
    tokens = torch.cat([normed, block.normk(image_tokens)], dim=1)
    return block.output(block.attention(normed, tokens), residual=queries)


def rows_and_columns_swapped(attention: CrossAttention) -> None:
    attention.k_pos_embed = attention.k_pos_embed.roll(attention.k_pos_embed.shape[1] // 2, dims=1)


def positions_on_values(attention: CrossAttention, queries: Tensor, tokens: Tensor) -> Tensor:
    placed = tokens + torch.cat([attention.q_pos_embed, attention.k_pos_embed])
    query = split_heads(attention.query(queries + attention.q_pos_embed), attention.heads)
    key, value = (split_heads(linear(placed), attention.heads) for linear in (attention.key, attention.value))
    return attend(attention, query, key, value, None)


def end_token_first(abstractor: Any) -> None:
    own = abstractor.forward
    abstractor.forward = lambda tokens: own(tokens).roll(1, dims=1)


def end_token_counted_as_text(decoder: Any) -> None:
    own = decoder.decode
    decoder.decode = lambda states, span, *more, **options: own(
        states, VisualSpan(span.start, span.stop - 1), *more, **options
    )


def residual_before_relu(block: RegressorBlock, states: Tensor) -> Tensor:
    inner = block.linear(states)
    return torch.relu(inner + states if block.residual else inner)


LAYER = r"^model\.layers\.\d+"
MISTAKES = {
    "qkv as [q;k;v]": each(r"vision_model.*self_attn$", qkv_in_three_blocks),
    "erf gelu in vision": each(r"vision_model.*mlp$", forward(lambda mlp, states: mlp.fc2(gelu(mlp.fc1(states))))),
    "no post_layernorm": each(r"vision_model$", put(post_layernorm=nn.Identity())),
    "vision eps 1e-5": each("vision_model", put(eps=1e-5), nn.LayerNorm),
    "cls after patches": each(r"vision_model\.embeddings$", forward(cls_after_patches)),
    "abstractor norm1/k eps 1e-6": each(r"crossattention\.norm[1k]$", put(eps=1e-6)),
    "abstractor norm2 eps 1e-6": each(r"crossattention\.output\.norm2$", put(eps=1e-6)),
    "ffn_ln eps 1e-5": each(r"ffn_ln$", put(eps=1e-5)),
    "residual from un-normed query": each(r"crossattention$", forward(residual_before_the_norm)),
    "k pos row/column swapped": each(r"crossattention\.attention$", rows_and_columns_swapped),
    "position added to values": each(r"crossattention\.attention$", forward(positions_on_values)),
    "no ffn_ln": each(r"crossattention\.output\.mlp$", put(ffn_ln=nn.Identity())),
    "w1 and w3 swapped": each(r"crossattention\.output\.mlp$", swap("w1", "w3")),
    "vit_eos first": each(r"visual_abstractor$", end_token_first),
    "swap k_proj ways": each(rf"{LAYER}\.self_attn\.k_proj\.multiway$", swap("0", "1")),
    "v_proj way 0 only": each(rf"{LAYER}\.self_attn\.v_proj$", text_way_only),
    "input_layernorm way 0 only": each(rf"{LAYER}\.input_layernorm$", text_way_only),
    "post layernorm way 0 only": each(rf"{LAYER}\.post_attention_layernorm$", text_way_only),
    "vit_eos counted as text": each(r"^model$", end_token_counted_as_text),
    "rms eps 1e-6": each("", put(eps=1e-6), RMSNorm),
    "gate and up swapped": each(rf"{LAYER}\.mlp$", swap("gate_proj", "up_proj")),
    "no residual in deepmlp": each("deepmlp", put(residual=False), RegressorBlock),
    "residual before ReLU in deepmlp": each("deepmlp", forward(residual_before_relu), RegressorBlock),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_goldens_show_a_mistake(mistake: str) -> None:
    check_mistake(mistake, MISTAKES[mistake])


def test_goldens_show_interleaved_rotary_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(states: Tensor, rotary: Tensor) -> Tensor:
        turned = torch.stack([-states[..., 1::2], states[..., 0::2]], dim=-1).flatten(-2)
        return states * rotary[0] + turned * rotary[1]

    monkeypatch.setattr(language, "rotate", interleaved)
    check_mistake("rope interleaved", lambda model: None)
