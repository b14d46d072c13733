"""pyiqa's q_align code replaces transformers' Llama for the whole process. Ours neither does, nor minds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import published_folders

PARTS = {
    "score": """
import torch
from pathlib import Path
from pyiqa_qscorer.metric import QScorer
torch.set_num_threads(1)
images = torch.rand(2, 3, 80, 60, generator=torch.Generator().manual_seed(0))
metric = QScorer(checkpoint)
with torch.no_grad():
    print("scores", [score.hex() for score in metric(images).flatten().tolist()])
""",
    "remember": """
import transformers.models.llama.modeling_llama as llama
from transformers import LlamaConfig
names = [name for name in dir(llama) if name.startswith(("Llama", "apply_", "eager_", "repeat_", "rotate_"))]
original = {name: getattr(llama, name) for name in names}
methods = {name: dict(vars(value)) for name, value in original.items() if isinstance(value, type)}
""",
    "compare": """
assert len(names) > 8
changed = [name for name in names if getattr(llama, name) is not original[name]]
changed += [name for name, own in methods.items() if dict(vars(original[name])) != own]
print("changed", changed)
""",
    "plain llama": """
import torch
from transformers import LlamaConfig, LlamaModel
sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10}
torch.manual_seed(0)
model = LlamaModel(LlamaConfig(**sizes)).eval()
with torch.no_grad():
    states = model(torch.arange(5)[None]).last_hidden_state
print("llama", [value.hex() for value in states.flatten().tolist()])
""",
    # pyiqa does not declare icecream, its debugging print; without it the import stops before the patch.
    "pyiqa patches": """
import sys, types
sys.modules.setdefault("icecream", types.ModuleType("icecream")).ic = print
before = __import__("transformers.models.llama.modeling_llama", fromlist=["LlamaAttention"]).LlamaAttention
try:
    import pyiqa.archs.qalign_arch
except ImportError as error:
    print("import", error)
import transformers.models.llama.modeling_llama as patched
print("patched", patched.LlamaAttention is not before)
""",
}


def run(checkpoint: Path, *parts: str) -> dict[str, list[str]]:
    """Lines of a fresh interpreter that runs the parts in order, by their first word."""
    script = f"checkpoint = {str(checkpoint)!r}\n" + "\n".join(PARTS[part] for part in parts)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    lines: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" ")
        lines.setdefault(word, []).append(rest)
    return lines


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the published layout: pyiqa registers its `model_type`, and its tokenizer is of a Llama class."""
    return published_folders(tmp_path_factory.mktemp("published"))[2]


def test_scoring_leaves_llama_as_it_is(checkpoint: Path) -> None:
    lines = run(checkpoint, "plain llama", "remember", "score", "compare", "plain llama")
    assert lines["changed"] == ["[]"]
    before, after = lines["llama"]
    assert before == after and len(lines["scores"]) == 1


@pytest.mark.slow
def test_scores_are_the_same_to_the_bit_before_and_after_pyiqa_patches_llama(checkpoint: Path) -> None:
    score_first = run(checkpoint, "score", "pyiqa patches", "score")
    patch_first = run(checkpoint, "pyiqa patches", "score")
    assert score_first["patched"] == patch_first["patched"] == ["True"]
    before, after = score_first["scores"]
    assert [before] == patch_first["scores"] and before == after
