"""Quiet-STaR's loss from its definition: one ordinary forward pass for every thought."""

import copy
from typing import Any

import torch
from narrowed import tensor
from torch import Tensor
from transformers import PreTrainedModel, Starcoder2Config, Starcoder2ForCausalLM

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.model import QuietLM
from selftaught.quiet.thoughts import decoder

START, END, PAD, VOCABULARY = 35, 36, 34, 37


def tiny(**changes: Any) -> Starcoder2ForCausalLM:
    """Grouped heads, rotary positions, and nothing inside that is float32 whatever the weights are."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
        "sliding_window": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Starcoder2ForCausalLM(Starcoder2Config(**(sizes | changes))).double()


def quiet(base: PreTrainedModel, config: QuietConfig) -> QuietLM:
    """With a mixing head that has begun to trust thoughts, and marks that have begun to move."""
    model = QuietLM(base, config, start=START, end=END, pad=PAD)
    torch.manual_seed(1)
    torch.nn.init.normal_(tensor(model.mixing.layers[-1].weight), std=0.5)
    torch.nn.init.normal_(model.moved, std=0.3 / config.embedding_scale)
    return model.double()


def texts(lengths: list[int], *, left: bool = False) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    longest = max(lengths)
    ids, mask = torch.full((len(lengths), longest), PAD), torch.zeros(len(lengths), longest).long()
    for row, length in enumerate(lengths):
        place = slice(longest - length, None) if left else slice(length)
        ids[row, place] = torch.randint(0, PAD, (length,), generator=draw)
        mask[row, place] = 1
    return ids, mask


def drawn(config: QuietConfig, ids: Tensor) -> Tensor:
    shape = (len(ids), config.thoughts, ids.shape[1], config.thought_tokens)
    return torch.randint(0, PAD, shape, generator=torch.Generator().manual_seed(3))


def states(model: QuietLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden states and the logits of one sequence with a thought in it or none."""
    plain = model.base.get_input_embeddings()(tokens[None])
    start, end = ((tokens == mark)[None, :, None] for mark in (START, END))
    scale = model.quiet_config.embedding_scale * getattr(
        model.base.get_input_embeddings(), "embed_scale", 1.0
    )
    moved = scale * (start * model.moved[0] + end * model.moved[1])
    given = {"inputs_embeds": plain + moved, "use_cache": False}
    hidden = decoder(model.base)(**given).last_hidden_state
    return hidden[0], model.base(**given).logits[0]


def naive_loss(
    model: QuietLM, ids: Tensor, mask: Tensor, thoughts: Tensor, think: Tensor | None = None
) -> Tensor:
    """The loss from its definition: every thought of every position in a forward pass of its own.

    With `think`, only its positions have thoughts, and the means are over these.
    """
    config, base, banned = model.quiet_config, model.base, [START, END, PAD]
    ahead, length = config.lookahead, config.thought_tokens
    talk_nll = [[] for _ in range(ahead)]
    base_nll, policy, policy_count = [], [], 0

    chosen = torch.ones_like(ids) if think is None else think
    for row, all_thoughts, real, thinks in zip(ids, thoughts, mask, chosen, strict=True):
        text = row[real.bool()]
        offset = int(real.argmax())
        size = len(text)
        here = thinks[real.bool()][:-1].bool().tolist()
        hidden, without = states(model, text)
        without = without.log_softmax(-1)
        base_nll += [-without[at, text[at + 1]] for at in range(size - 1)]
        padded = len(row) if config.baseline == "mean_log" else size
        last = max(padded - ahead - (config.baseline == "mean_log"), 0)
        policy_count += (last if think is None else sum(here[:last])) * config.thoughts
        for at in [one for one in range(size - 1) if here[one]]:
            mixed, whole = [], []
            for thought in all_thoughts[:, offset + at]:
                marks = torch.tensor([START, *thought.tolist(), END])
                with_thought, said = states(
                    model, torch.cat([text[: at + 1], marks, text[at + 1 : at + ahead]])
                )
                gains = []
                for k in range(min(ahead, size - 1 - at)):
                    after = at + length + 2 + k
                    weight = model.mixing(hidden[at + k], with_thought[after])
                    target = text[at + k + 1]
                    if config.mix == "hidden":
                        state = (1 - weight) * hidden[at + k] + weight * with_thought[after]
                        log_prob = base.lm_head(state).log_softmax(-1)[target]
                    else:
                        log_prob = (1 - weight) * without[at + k, target] + weight * said[
                            after
                        ].log_softmax(-1)[target]
                    talk_nll[k].append(-log_prob)
                    gains.append((log_prob.detach(), without[at + k, target].detach()))
                mixed.append(gains)
                logits = (said[at + 1 : at + 1 + length] / config.reinforce_temperature).clone()
                logits[:, banned] = -torch.inf
                said_it = logits.log_softmax(-1)[torch.arange(length), thought]
                whole.append(
                    said_it.sum()
                    if config.reinforce_reduction == "sum" or not length
                    else said_it.mean()
                )
            # The authors leave the last such position out, and count padding as tokens of no gain.
            authors = config.baseline == "mean_log"
            if at > (len(row) - ahead - 2 if authors else size - ahead - 1):
                continue
            policy += [
                -advantage * log_prob
                for advantage, log_prob in zip(advantages(config, mixed), whole, strict=True)
            ]
    loss = config.base_nll_weight * mean_loss(config, base_nll)
    known = [mean_loss(config, k) for k in talk_nll if k]
    loss = loss + config.nll_weight * sum(known) / ahead
    return loss + config.reinforce_weight * sum(policy) / max(policy_count, 1)


def mean_loss(config: QuietConfig, losses: list[Tensor]) -> Tensor:
    """The mean; the authors leave losses of exactly 0 out."""
    kept = [one for one in losses if one != 0] if config.drop_zero_losses else losses
    return torch.stack(kept).mean()


def advantages(config: QuietConfig, mixed: list[list[tuple[Tensor, Tensor]]]) -> list[float]:
    """Of the thoughts of one position, from (with, without) log-probabilities per lookahead token."""
    if config.baseline == "log_mean":
        by_token = zip(*mixed, strict=True)
        means = [torch.stack([said.exp() for said, _ in token]).mean().log() for token in by_token]
        found = [
            sum(said - mean for (said, _), mean in zip(one, means, strict=True)) for one in mixed
        ]
    else:
        found = [sum(said - without for said, without in one) for one in mixed]
        if len(found) > 1:
            mean = sum(found) / len(found)
            found = [one - mean for one in found]
    return [max(float(one), 0.0) for one in found]


def assert_equal_to_naive(
    model: QuietLM,
    ids: Tensor,
    mask: Tensor,
    think: Tensor | None = None,
    *,
    tolerance: float = 1e-9,
) -> None:
    """The fast loss and every gradient, to a tolerance."""
    thoughts = drawn(model.quiet_config, ids)
    slow = copy.deepcopy(model)
    expected = naive_loss(slow, ids, mask, thoughts, think)
    expected.backward()
    loss = model(ids, mask, think_mask=think, thoughts=thoughts).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
    for (name, fast), (_, plain) in zip(
        model.named_parameters(), slow.named_parameters(), strict=True
    ):
        torch.testing.assert_close(fast.grad, plain.grad, rtol=tolerance, atol=tolerance, msg=name)
