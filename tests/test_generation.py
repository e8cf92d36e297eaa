"""Sampling, its limits, and attention that remembers."""

import pytest
import torch
from torch import nn

from vl_mtl_lora import UserError
from vl_mtl_lora.attention import CrossAttention, KeyValueCache, split_attention
from vl_mtl_lora.backbones.generation import RowSampler
from vl_mtl_lora.backbones.prefix import causal_mask


def test_sampling_follows_the_distribution_and_the_nucleus():
    logits = torch.tensor([[1.0, 0.0, 3.0, 2.0]])
    p = (logits / 1.5).softmax(-1)[0]
    draws = RowSampler(range(4000), 1.5, 1.0)(logits.expand(4000, 4)).argmax(1)
    torch.testing.assert_close(torch.bincount(draws, minlength=4) / 4000, p, atol=0.03, rtol=0)
    # 0.75 of the probability is reached by the two likeliest tokens: 0.52 and 0.27.
    draws = RowSampler(range(1000), 1.5, 0.75)(logits.expand(1000, 4)).argmax(1)
    share = torch.bincount(draws, minlength=4) / 1000
    assert share[0] == share[1] == 0
    torch.testing.assert_close(share[2], p[2] / (p[2] + p[3]), atol=0.05, rtol=0)


def test_a_row_s_draws_are_its_own():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together, alone = RowSampler([3, 4, 5], 1.0, 0.9), RowSampler([4], 1.0, 0.9)
    for _ in range(5):
        assert together(logits).argmax(1)[1] == alone(logits[1:2]).argmax(1)[0]


@pytest.mark.parametrize("options,message", [
    ({"num_beams": 2, "temperature": 1.0}, "exclude each other"), ({"temperature": -1.0}, "temperature >= 0"),
    ({"top_p": 0.0}, r"top_p in \(0, 1\]"), ({"num_beams": 0}, "num_beams >= 1"),
    ({"temperature": 1.0, "seed": [1]}, r"one seed per row \(2\)")])
def test_impossible_ways_of_generating_are_refused(tiny_backbone, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_backbone().generate(torch.randn(2, 3, 32, 32), ["a", "b"], **options)


@pytest.mark.parametrize("widths", [(16, 16), (16, 12)], ids=["packed", "other key width"])
@pytest.mark.parametrize("mask", ["none", "additive", "per head"])
def test_cross_attention_equals_multihead_attention(widths, mask):
    width, other = widths
    source = nn.MultiheadAttention(width, 4, kdim=other, vdim=other, batch_first=True).double().eval()
    nn.init.normal_(source.in_proj_bias)
    split = split_attention(source, "here", cross=True)
    q, kv = torch.randn(2, 5, width).double(), torch.randn(2, 7, other).double()
    hidden = torch.zeros(5, 7).double().masked_fill(torch.rand(5, 7) < 0.3, float("-inf"))
    hidden[:, 0] = 0.0
    masks = {"none": None, "additive": hidden, "per head": hidden.expand(8, 5, 7) * 1}
    expected, _ = source(q, kv, kv, need_weights=False, attn_mask=masks[mask])
    got, _ = split(q, kv, kv, need_weights=False, attn_mask=masks[mask])
    torch.testing.assert_close(got, expected)
    assert isinstance(split, CrossAttention) and split_attention(split, "here", cross=True) is split
    fused = source.in_proj_weight if width == other else source.q_proj_weight
    assert split.q.weight.data_ptr() == fused.data_ptr()


def test_step_by_step_attention_is_the_whole_at_once():
    source = nn.MultiheadAttention(16, 4, batch_first=True).double().eval()
    split = split_attention(source, "here")
    split.cache = KeyValueCache()
    x = torch.randn(3, 6, 16).double()
    whole, _ = split(x, x, x, attn_mask=causal_mask(x))  # an idle cache changes nothing
    with split.cache.open() as cache:
        parts = []
        for start, stop in ((0, 3), (3, 4), (4, 6)):
            part = x[:, start:stop]
            readable = torch.ones(3, stop, dtype=torch.bool)
            parts.append(split(part, part, part, attn_mask=causal_mask(part, readable))[0])
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
        cache.select(torch.tensor([2, 2, 0]))
        assert cache.extend(split, *(t[:, :, :0] for t in cache.recall(split)))[0].shape[0] == 3
    assert not split.cache.filled


def test_padding_is_not_read_and_gives_no_nan():
    x = torch.randn(2, 4, 8)
    mask = causal_mask(x, torch.tensor([[False, False, True, True], [True] * 4]))
    assert mask.shape == (2, 1, 4, 4)
    assert (mask[0, 0] == 0).int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(mask[1, 0], causal_mask(x))


@pytest.mark.parametrize("source,message", [(nn.MultiheadAttention(16, 4, add_bias_kv=True), "bias_k"),
                                            (nn.Linear(2, 2), "expected nn.MultiheadAttention")])
def test_other_cross_attention_is_refused(source, message):
    with pytest.raises(UserError, match=message):
        split_attention(source, "decoder.1", cross=True)
