"""Loading takes no more memory than the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import edit_json, published_folders, shards

from pyiqa_qscorer.model import QScorerConfig, QScorerForScoring

PEAK_OF_LOADING = """
import sys, threading, time
import torch
from pathlib import Path
torch.set_num_threads(1)
from pyiqa_qscorer.checkpoints import load_folder

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.002)

torch.ones(64, 64) @ torch.ones(64, 64)
done, seen, before = threading.Event(), [], anonymous()
thread = threading.Thread(target=watch)
thread.start()
loaded = load_folder(*map(Path, sys.argv[1:]), dtype="bfloat16")
done.set()
thread.join()
weights = sum(t.numel() * t.element_size() for t in loaded.model.state_dict().values())
print(weights, max(seen) - before, anonymous() - before)
"""


def widened_lora(tmp_path: Path, width: int, layers: int) -> tuple[Path, Path]:
    """LoRA and base folder with a wider decoder: float16 on disk, so that loading in bfloat16 must convert."""
    lora, base, _ = published_folders(tmp_path, stand_in=True)
    for folder in (lora, base):
        decoder = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        edit_json(folder / "config.json", **decoder)
    with torch.device("meta"):
        model = QScorerForScoring(QScorerConfig.from_published(json.loads((lora / "config.json").read_text())))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("pos_embed")}
    state = {name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}
    trained = ("model.embed_tokens", "lm_head", "deepmlp", "model.vision_model", "model.visual_abstractor")
    own = {f"base_model.model.{name}": state.pop(name) for name in list(state) if name.startswith(trained)}
    torch.save(own, lora / "non_lora_trainables.bin")
    for shard in shards(base):
        shard.unlink()
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": sorted(state)[i::2] for i in range(2)}
    for file, keys in halves.items():
        torch.save({key: state[key] for key in keys}, base / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    targets = [f"model.layers.{i}.self_attn.{m}" for i in range(layers) for m in ("q_proj", "v_proj.multiway.1")]
    edit_json(lora / "adapter_config.json", target_modules=targets)
    factors = {"lora_A": torch.ones(4, width), "lora_B": torch.ones(width, 4)}
    adapter = {f"base_model.model.{target}.{factor}.weight": t for target in targets for factor, t in factors.items()}
    torch.save(adapter, lora / "adapter_model.bin")
    return lora, base


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_peak_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    lora, base = widened_lora(tmp_path, width=1024, layers=4)
    environment = {**os.environ, "PYIQA_QSCORER_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_LOADING, str(lora), str(base)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    weights, peak, after = map(int, done.stdout.split())
    assert weights > 250e6
    assert after > 0.9 * weights  # converted, so not the mapped file itself
    assert peak < weights + 80e6, f"{weights / 1e6:.0f} MB of weights took {peak / 1e6:.0f} MB"
