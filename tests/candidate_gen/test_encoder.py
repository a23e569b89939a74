"""Sequence encoders: one behaviour for every kind, and each kind's attention against plain loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from candidate_gen.encoder import (
    GAP_BUCKETS,
    EncoderConfig,
    HstuLayer,
    LigrLayer,
    PairBias,
    SequenceEncoder,
    SoftmaxAttention,
    gap_buckets,
)
from features.history import UNDATED_TS_MS

KINDS = ("ligr", "hstu", "sasrec")
HOUR_MS = 3_600_000


def encoder(kind: str, length: int = 12, **options) -> SequenceEncoder:
    """A small encoder in float64 whose zero-initialised biases say something."""
    torch.manual_seed(3)
    config = EncoderConfig(**{"kind": kind, "dim": 8, "layers": 2, "heads": 2, "time_gaps": True, **options})
    model = SequenceEncoder(config, length).double().eval()
    for module in model.modules():
        if isinstance(module, PairBias):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter)
    return model


def histories(rng: np.random.Generator, n: int = 3, positions: int = 12, dim: int = 8) -> tuple[torch.Tensor, ...]:
    """Events, when they were, and the instant each state is asked at: the next event's."""
    events = torch.from_numpy(rng.normal(size=(n, positions, dim)))
    at_ms = np.cumsum(rng.integers(1, 5 * HOUR_MS, (n, positions + 1)), axis=1)
    return events, torch.from_numpy(at_ms[:, :-1].copy()), torch.from_numpy(at_ms[:, 1:].copy())


def attention_of(layer: torch.nn.Module) -> torch.nn.Module:
    return layer if isinstance(layer, HstuLayer) else layer.attention


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", ["relative", "absolute"])
class TestEveryKind:
    def test_a_state_knows_nothing_of_the_future(self, kind: str, places: str) -> None:
        model, rng = encoder(kind, positions=places), np.random.default_rng()
        events, event_ms, asked_ms = histories(rng)
        before = model(events, event_ms, asked_ms)
        events[:, 7:] *= 2 * torch.randn(8).double()
        event_ms[:, 7:] += 90 * HOUR_MS
        asked_ms[:, 7:] += 90 * HOUR_MS
        after = model(events, event_ms, asked_ms)
        assert torch.equal(before[:, :7], after[:, :7])
        assert (before[:, 7:] != after[:, 7:]).any(dim=-1).all()

    def test_padding_behind_the_last_event_changes_nothing(self, kind: str, places: str) -> None:
        model, rng = encoder(kind, positions=places), np.random.default_rng()
        events, event_ms, asked_ms = histories(rng)
        padded, padded_ms, padded_asked_ms = events.clone(), event_ms.clone(), asked_ms.clone()
        padded[:, 5:], padded_ms[:, 5:], padded_asked_ms[:, 5:] = 0.0, UNDATED_TS_MS, UNDATED_TS_MS
        short = model(events[:, :5], event_ms[:, :5], asked_ms[:, :5])
        assert torch.allclose(model(padded, padded_ms, padded_asked_ms)[:, :5], short, rtol=0, atol=1e-12)

    def test_every_parameter_and_every_seen_event_gets_a_gradient(self, kind: str, places: str) -> None:
        model, rng = encoder(kind, positions=places), np.random.default_rng()
        events, event_ms, asked_ms = histories(rng)
        events.requires_grad_()
        (model(events, event_ms, asked_ms)[:, 8] * torch.randn(8).double()).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        assert events.grad is not None
        assert (events.grad[:, :9].abs().sum(dim=-1) > 0).all()
        assert (events.grad[:, 9:] == 0).all()

    def test_the_order_of_the_past_matters(self, kind: str, places: str) -> None:
        model, rng = encoder(kind, positions=places, time_gaps=False), np.random.default_rng()
        events, *_ = histories(rng)
        swapped = events[:, [1, 0, *range(2, 12)]]
        assert not torch.allclose(model(events)[:, -1], model(swapped)[:, -1], rtol=1e-3, atol=1e-3)

    def test_a_later_request_sees_the_same_history_as_older(self, kind: str, places: str) -> None:
        model, rng = encoder(kind, positions=places), np.random.default_rng()
        events, event_ms, asked_ms = histories(rng)
        later_ms = asked_ms.clone()
        later_ms[:, -1] += 1000 * HOUR_MS
        now, later = model(events, event_ms, asked_ms), model(events, event_ms, later_ms)
        assert torch.equal(now[:, :-1], later[:, :-1])
        assert (now[:, -1] != later[:, -1]).any(dim=-1).all()

    def test_without_times_every_gap_is_unknown(self, kind: str, places: str) -> None:
        model, rng = encoder(kind, positions=places), np.random.default_rng()
        events, event_ms, _ = histories(rng)
        undated = model(events, torch.full_like(event_ms, UNDATED_TS_MS))
        assert torch.allclose(model(events), undated, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_a_history_elsewhere_changes_nothing_but_what_is_cut_off(kind: str) -> None:
    # Attention is made to reach 3 tokens back, two layers of it 6: from the seventh state after a cut on, all is equal.
    model, rng = encoder(kind), np.random.default_rng()
    with torch.no_grad():
        for layer in model.layers:
            attention_of(layer).bias.bias_HP[:, 4:] = -1e9
    events, event_ms, asked_ms = histories(rng)
    cut = model(events[:, 3:], event_ms[:, 3:], asked_ms[:, 3:])
    assert torch.allclose(model(events, event_ms, asked_ms)[:, 9:], cut[:, 6:], rtol=0, atol=1e-12)


def test_softmax_attention_is_what_plain_loops_say() -> None:
    rng, length, heads, width = np.random.default_rng(), 6, 2, 4
    events, event_ms, asked_ms = histories(rng, 2, length)
    model = encoder("ligr", length)
    seen: list[torch.Tensor] = []
    attention = attention_of(model.layers[0])
    assert isinstance(attention, SoftmaxAttention)
    attention.register_forward_hook(lambda _, given, made: seen.extend((given[0], made)))
    model(events, event_ms, asked_ms)
    token, made = (t.detach() for t in seen)
    gap = gap_buckets(asked_ms, event_ms)
    for b in range(2):
        for i in range(length):
            row = attention.query_key_value(token[b, i])
            heads_out = []
            for h in range(heads):
                query = row[h * width : (h + 1) * width]
                scores, values = [], []
                for j in range(i + 1):
                    other = attention.query_key_value(token[b, j])
                    key, value = other[8 + h * width :][:width], other[16 + h * width :][:width]
                    bias = attention.bias.bias_HP[h, i - j] + attention.bias.bias_HG[h, gap[b, i, j]]
                    scores.append(query @ key / width**0.5 + bias)
                    values.append(value)
                share = torch.softmax(torch.stack(scores), dim=0)
                heads_out.append(sum(s * v for s, v in zip(share, values, strict=True)))
            expected = attention.out(torch.cat(heads_out))
            assert torch.allclose(made[b, i], expected, rtol=0, atol=1e-10)


def test_an_hstu_layer_is_what_plain_loops_say() -> None:
    rng, length, heads, width = np.random.default_rng(), 6, 2, 4
    model = encoder("hstu", length)
    layer = model.layers[0]
    assert isinstance(layer, HstuLayer)
    events, event_ms, asked_ms = histories(rng, 2, length)
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _, given, made: seen.append(made))
    model(events, event_ms, asked_ms)
    gap = gap_buckets(asked_ms, event_ms)
    silu = torch.nn.functional.silu
    for b in range(2):
        made = [silu(layer.gate_value_query_key(layer.input_norm(events[b, j]))) for j in range(length)]
        for i in range(length):
            heads_out = []
            for h in range(heads):
                total = torch.zeros(width).double()
                for j in range(i + 1):
                    value, query, key = made[j][8:][h * 4 :][:4], made[i][16:][h * 4 :][:4], made[j][24:][h * 4 :][:4]
                    bias = layer.bias.bias_HP[h, i - j] + layer.bias.bias_HG[h, gap[b, i, j]]
                    total = total + silu(query @ key + bias) * value
                heads_out.append(total)
            expected = events[b, i] + layer.out(layer.seen_norm(torch.cat(heads_out)) * made[i][:8])
            assert torch.allclose(seen[0][b, i], expected, rtol=0, atol=1e-10)


def test_a_ligr_layer_adds_what_its_gates_let_through() -> None:
    # Gates shut (bias -50) leave the state as it was; gates open (bias +50, no weights) make it a plain residual.
    model, rng = encoder("ligr", layers=1), np.random.default_rng()
    layer = model.layers[0]
    assert isinstance(layer, LigrLayer)
    events, *_ = histories(rng)
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _, given, made: seen.append(made))
    inside: list[torch.Tensor] = []
    layer.attention.register_forward_hook(lambda _, given, made: inside.append(made))
    layer.ffn.register_forward_hook(lambda _, given, made: inside.append(made))
    for bias in (-50.0, 50.0):
        for gate in (layer.attention_gate, layer.ffn_gate):
            torch.nn.init.zeros_(gate.weight)
            torch.nn.init.constant_(gate.bias, bias)
        model(events)
    assert torch.allclose(seen[0], events, rtol=0, atol=1e-12)
    assert torch.allclose(seen[1], events + inside[2] + inside[3], rtol=0, atol=1e-12)


def test_gap_buckets_double_every_other_step_and_0_is_unknown() -> None:
    # 0.5 s and 1 s: 1.  2 s = 2^1: 1 + 2.  3 s = 2^1.58: 1 + floor(3.17).  1 h = 2^11.81: 1 + floor(23.6).
    asked_ms = torch.tensor([[10 * HOUR_MS]])
    gaps_ms = (500, 1000, 2000, 3000, HOUR_MS, 2**60)
    found = [int(gap_buckets(asked_ms, asked_ms - gap)[0, 0, 0]) for gap in gaps_ms]
    assert found == [1, 1, 3, 4, 24, GAP_BUCKETS - 1]
    assert gap_buckets(asked_ms, torch.tensor([[UNDATED_TS_MS]])).item() == 0
    assert gap_buckets(torch.tensor([[UNDATED_TS_MS]]), asked_ms).item() == 0


def test_wrong_shapes_and_names_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="choose from ligr, hstu, sasrec"):
        EncoderConfig(kind="gru")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="not a multiple of heads"):
        EncoderConfig(dim=10, heads=4)
    with pytest.raises(ValueError, match="cut the histories"):
        encoder("ligr", 4)(torch.zeros(1, 5, 8).double())
