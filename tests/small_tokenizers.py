"""Small real tokenizers of several kinds, made in the test and saved nowhere."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen 2.5's: a turn ends with a special token and a line break."""
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}{% set r = '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ '<|im_start|>assistant\n<think>\n' + r + '\n</think>\n\n' + c + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""Opens a thought, and rewrites answers; with enable_thinking false it ends the thought at once."""
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)
SILENT_SYSTEM = CHATML.replace("{{ '<|im_start|>' + m", "{% if m.role != 'system' %}{{ '<|im_start|>' + m", 1).replace(
    "\n' }}{% endfor %}", "\n' }}{% endif %}{% endfor %}", 1
)  # fmt: skip
"""Leaves a system message out without a word."""


def byte_level(
    *,
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
    added: tuple[str, ...] = (),
    template: str | None = None,
    add_bos: bool = False,
    add_eos: bool = False,
    pad: str = "<pad>",
    bos: str | None = "<s>",
) -> PreTrainedTokenizerFast:
    """A token per byte, and special tokens; `add_bos` and `add_eos` put them around every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", "<pad>", *special, *added, *alphabet]
    raw = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if add_bos or add_eos:
        single = " ".join(["<s>"] * add_bos + ["$A"] + ["</s>"] * add_eos)
        raw.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    raw.add_tokens(list(added))
    return _wrapped(raw, special, template, pad, bos)


def sentencepiece_like(template: str | None = None) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is put before every text, and one is taken from the decoded beginning."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-=*.,:;?!/[]()"]
    words = ["▁T", "▁Th", "▁The", "▁7", "he"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    merges = [("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("▁", "7"), ("h", "e")]
    raw = Tokenizer(
        models.BPE(
            vocab={name: at for at, name in enumerate(names)}, merges=merges, unk_token="<unk>",
            byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # type: ignore[list-item]
    )
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]  # type: ignore[list-item]
    )  # fmt: skip
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(raw, (), template, "</s>", "<s>")


def _wrapped(
    raw: Tokenizer, special: tuple[str, ...], template: str | None, pad: str, bos: str | None
) -> PreTrainedTokenizerFast:
    given: dict[str, Any] = {"bos_token": bos} if bos else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", pad_token=pad,
        additional_special_tokens=list(special), **given,
    )  # fmt: skip
    made.chat_template = template
    return made
