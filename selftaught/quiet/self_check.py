"""Does this attention give the model's own results? Asked once, on the user's own model."""

import torch
from transformers import PreTrainedModel

from selftaught.quiet.attention import layer_name, refusal, thoughtful
from selftaught.quiet.thoughts import Marks, language_head, read, talk

TEXT, THOUGHT, LOOKAHEAD = 12, 3, 2
AGREEMENT = {torch.float64: 1e-4, torch.float32: 1e-3}
"""How far logits may be from the model's own, in their standard deviations; 0.5 in short types, where
rounding alone gives 0.2."""


def check_attention(base: PreTrainedModel) -> None:
    """Refuse a model whose attention cannot be replaced.

    Raises:
        ValueError: names the layer.
    """
    if not base._can_set_attn_implementation():
        raise ValueError(
            refusal(base, f"the attention of {layer_name(base, 0)} cannot be replaced")
        )


@torch.no_grad()
def self_check(base: PreTrainedModel, marks: Marks) -> None:
    """Compare thoughts after a short text with ordinary forward passes of the same tokens.

    Raises:
        ValueError: the model cannot think in parallel; says which layer or what differs.
    """
    check_attention(base)
    config = base.config.get_text_config()
    draw = torch.Generator().manual_seed(0)
    allowed = torch.tensor([i for i in range(min(config.vocab_size, 1000)) if i not in marks.never])
    picked = torch.randint(len(allowed), (TEXT + THOUGHT,), generator=draw)
    ids = allowed[picked].to(base.device)
    text, thought = ids[:TEXT], ids[TEXT:]
    position = torch.tensor([[TEXT // 3, TEXT - LOOKAHEAD - 1]], device=base.device)
    learning = base.training
    base.eval()
    try:
        with thoughtful(base):
            prefix = read(base, text[None], None)
            given = thought.expand(1, 1, position.shape[1], -1)
            _, states_RKD = talk(base, prefix, position, given, LOOKAHEAD, marks)
        ours = language_head(base)(states_RKD)
        for row, at in enumerate(position[0].tolist()):
            start, end = torch.tensor([[marks.start], [marks.end]], device=base.device)
            follows = text[at + 1 : at + LOOKAHEAD]
            whole = torch.cat([text[: at + 1], start, thought, end, follows])
            own = base(input_ids=whole[None], use_cache=False).logits[0, -LOOKAHEAD:]
            apart = float((ours[row] - own).float().abs().max() / own.float().std())
            if not apart <= AGREEMENT.get(own.dtype, 0.5):
                told = (
                    f"after a thought its logits would be off by {apart:.2g} of their standard "
                    f"deviations; its layers are {layer_name(base, 0)}"
                )
                raise ValueError(refusal(base, told))
    except torch.OutOfMemoryError:
        raise
    # What code that was not written for another attention may do with one.
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        told = f"its code does not go with another attention ({error})"
        raise ValueError(refusal(base, told)) from error
    finally:
        base.train(learning)
