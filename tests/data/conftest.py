"""Small tokenizers made on the spot, each with the trait of a real one, and rows to feed them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from selm_fast.data.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The sky is blue and the sea is green.",
    "Why is the sky blue? Because of the air.",
    "A: The answer is that it is so. A: The answer is no.",
    "Hello there, how are you today? I am fine, thank you.",
] * 40

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PLAIN_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|stop|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
SPOKEN_CHAT = "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A: ' }}{{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}A: {% endif %}"
)
MakeTokenizer = Callable[..., Tokenizer]
WriteRows = Callable[..., str]


def train_backend(special: list[str], *, use_regex: bool = True, spaces: bool = False) -> Backend:
    """A BPE of about 400 tokens: byte-level, or sentencepiece-like with visible spaces and byte fallback."""
    if spaces:
        backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", *special, *BYTES]
        alphabet: list[str] = []
    else:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700 if spaces else 420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in BYTES]
    return Backend.from_str(json.dumps(content))  # byte tokens belong to the vocabulary and are not special


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> MakeTokenizer:
    """Write a tokenizer to a folder and load it as the product does."""

    def make(
        template: str | None = PLAIN_CHAT,
        *,
        special: Iterable[str] = ("<|system|>", "<|user|>", "<|assistant|>"),
        bos: str | None = "<|bos|>",
        eos: str | None = "<|eos|>",
        pad: str | None = None,
        adds_bos: bool = False,
        **backend: Any,
    ) -> Tokenizer:
        named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        named = {name: token for name, token in named.items() if token is not None}
        tokens = list(dict.fromkeys([*named.values(), *special]))
        trained = train_backend(tokens, **backend)
        if adds_bos:
            first = [(bos, trained.token_to_id(bos))]
            trained.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=first)
        hf = PreTrainedTokenizerFast(tokenizer_object=trained, chat_template=template, **named)
        folder = tmp_path_factory.mktemp("tokenizer")
        hf.save_pretrained(str(folder))
        return load_tokenizer(str(folder))

    return make


@pytest.fixture(scope="session")
def chat(make_tokenizer: MakeTokenizer) -> Tokenizer:
    """The template writes BOS and one EOS a turn, and a newline behind it."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama(make_tokenizer: MakeTokenizer) -> Tokenizer:
    """Llama-3's traits: turns end with <|eot_id|>, eos_token is another one, the tokenizer adds BOS by itself."""
    special = ("<|start|>", "<|stop|>", "<|eot_id|>")
    return make_tokenizer(LLAMA_CHAT, special=special, eos="<|end_of_text|>", adds_bos=True)


@pytest.fixture(scope="session")
def merging(make_tokenizer: MakeTokenizer) -> Tokenizer:
    """Merges across the prompt's border: 'A: ' and 'The' share tokens; its template ends turns with no EOS."""
    return make_tokenizer(SPOKEN_CHAT, special=(), use_regex=False)


@pytest.fixture(scope="session")
def sentencepiece(make_tokenizer: MakeTokenizer) -> Tokenizer:
    """Spaces are part of the tokens, and one is put before every stretch of text."""
    return make_tokenizer(spaces=True, bos="<s>", eos="</s>", adds_bos=True)


@pytest.fixture
def write_rows(tmp_path: Path) -> Iterator[WriteRows]:
    """Write rows as a JSONL file and give its path."""

    def write(rows: Iterable[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    yield write


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real preference rows beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not (folder / "selm_train.jsonl").is_file():
        pytest.skip("no real rows beside the repository")
    return folder
