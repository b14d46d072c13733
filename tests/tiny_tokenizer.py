"""A stand-in for LLaMA's licensed tokenizer, so that a bare clone can test whole checkpoints.

It has 32,000 pieces, of which those that the three prompts, the answer and the blank need lie at LLaMA's ids; words
outside the prompts fall apart into letters and bytes with arbitrary ids. `write_sentencepiece` makes a real
SentencePiece file, read by the code that reads the licensed one; `write_json` what our own layout holds.
"""

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as proto
from transformers import LlamaTokenizer

VOCABULARY = 32000
BLANK = "▁"
PINNED_PIECES = {
    **{263: "▁a", 278: "▁the", 304: "▁to", 310: "▁of", 319: "▁A", 322: "▁and", 338: "▁is", 366: "▁you", 385: "▁an"},
    **{445: "▁this", 450: "▁The", 568: "ite", 723: "▁would", 1001: "ER", 1128: "▁How", 1248: "▁pol", 1404: "▁user"},
    **{1546: "▁between", 1799: "SS", 1967: "▁image", 3148: "▁US", 4076: "▁gives", 5155: "▁questions", 5328: "How"},
    **{6089: "▁answers", 6554: "▁rate", 8444: "▁helpful", 9047: "IST", 11029: "▁quality", 12758: "▁curious"},
    **{13173: "▁detailed", 13563: "▁chat", 13566: "ANT", 20255: "▁assistant", 21082: "▁intelligence"},
    **{22933: "ASS", 23116: "▁artificial", 29871: "▁", 29879: "s", 29889: ".", 29892: ",", 29901: ":", 29915: "'"},
    29973: "?",
}
_TOKENIZER_CONFIG = {
    **{"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False},
    **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    **{"model_max_length": 2048, "padding_side": "right"},
}


def write_sentencepiece(folder: Path, *, swap: tuple[int, int] | None = None) -> Path:
    """Write `tokenizer.model` into `folder`, and `tokenizer_config.json` unless there is one.

    Args:
        swap: exchange the pieces of two ids, which makes it a wrong tokenizer.
    """
    pieces = _pieces()
    if swap is not None:
        first, second = swap
        pieces[first], pieces[second] = pieces[second], pieces[first]
    model = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = VOCABULARY
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = folder / "tokenizer_config.json"
    if not settings.exists():
        settings.write_text(json.dumps(_TOKENIZER_CONFIG), encoding="utf-8")
    return folder


def write_json(folder: Path) -> Path:
    """Write the same tokenizer as `tokenizer.json`, without the SentencePiece file."""
    write_sentencepiece(folder)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    tokenizer.save_pretrained(folder)
    return folder


def _pieces() -> list[tuple[str, float, int]]:
    """(text, score, kind) of every id. Pieces grow letter by letter; those of word starts are joined first."""
    kinds = proto.ModelProto.SentencePiece
    special = [("<unk>", 0.0, kinds.UNKNOWN), ("<s>", 0.0, kinds.CONTROL), ("</s>", 0.0, kinds.CONTROL)]
    table = dict(enumerate(special))
    table.update({3 + byte: (f"<0x{byte:02X}>", 0.0, kinds.BYTE) for byte in range(256)})
    words = sorted(PINNED_PIECES.values(), key=lambda word: (not word.startswith(BLANK), -len(word), word))
    grown = list(dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1)))
    letters = sorted({letter for word in words for letter in word} | set(map(chr, range(33, 127))))
    rank = {text: -float(index + 1) for index, text in enumerate([*grown, *letters])}
    ids = {text: index for index, text in PINNED_PIECES.items()}
    table.update({index: (text, rank[text], kinds.NORMAL) for text, index in ids.items()})
    free = (index for index in range(VOCABULARY) if index not in table)
    for text in rank:
        if text not in ids:
            table[next(free)] = (text, rank[text], kinds.NORMAL)
    for index in range(VOCABULARY):  # letters of private use, which no text has
        table.setdefault(index, (chr(0xF0000 + index), -1e6, kinds.UNUSED))
    return [table[index] for index in range(VOCABULARY)]
