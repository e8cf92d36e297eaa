"""The open_clip backbone against the untouched library model."""

import copy

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from vl_mtl_lora import AdapterConfig, TaskRouter, UserError, inject, load_backbone
from vl_mtl_lora.attention import split_attention

TEXTS = ["a red circle", "there is no blue rectangle", "a", "the shape is green"]


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_embeddings_equal_the_library_s_own(tiny_backbone, images):
    backbone = tiny_backbone()
    tokens = backbone.tokenize(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_image(images), backbone.model.encode_image(images, normalize=True))
        torch.testing.assert_close(backbone.encode_text(tokens), backbone.model.encode_text(tokens, normalize=True))
        # Columns after the longest text change nothing.
        torch.testing.assert_close(backbone.encode_text(tokens[:, :8]), backbone.encode_text(tokens), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_fresh_adapters_change_no_output(tiny_backbone, images, batch_first):
    untouched, backbone = tiny_backbone(), tiny_backbone()
    if not batch_first:  # as open_clip 3.x may run its blocks
        for transformer in (backbone.model.visual.transformer, backbone.model.transformer):
            transformer.batch_first = False
            for block in transformer.resblocks:
                block.attn.batch_first = False
    router = TaskRouter(["a", "b", "c"])
    before = {name: (p.data_ptr(), p.clone()) for name, p in backbone.library_state().items()}
    inject(backbone, AdapterConfig(rank=4), router)
    after = backbone.library_state()
    assert after.keys() == before.keys() == dict(untouched.model.named_parameters()).keys()
    assert all(after[n].data_ptr() == before[n][0] and torch.equal(after[n], before[n][1]) for n in before)
    tokens = backbone.tokenize(TEXTS)
    with torch.no_grad(), router.use(torch.tensor([0, 2, 1, 1])):
        for ours, theirs in (
                (backbone.encode_image(images), untouched.model.encode_image(images, normalize=True)),
                (backbone.encode_text(tokens), untouched.model.encode_text(tokens, normalize=True)),
                (backbone.model.encode_image(images), untouched.model.encode_image(images)),
                (backbone.model.encode_text(tokens), untouched.model.encode_text(tokens))):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        ours, theirs = backbone.token_logits(images, tokens), untouched.token_logits(images, tokens)
        torch.testing.assert_close(ours, theirs, atol=1e-6 * float(theirs.abs().max()), rtol=1e-6)


def test_both_towers_learn_and_every_place_gets_a_gradient(tiny_backbone, images):
    backbone = tiny_backbone()
    router = TaskRouter(["a", "b"])
    summary = inject(backbone, AdapterConfig(rank=4), router)
    with router.use(torch.tensor([0, 1, 0, 1])):
        states = backbone.image_states(images)
        loss = backbone.token_logits(states, backbone.tokenize(TEXTS)[:, :9]).square().mean()
        loss = loss + (states.embedding * backbone.encode_text(backbone.tokenize(TEXTS))).sum()
    loss.backward()
    assert all(layer.up.grad.abs().sum() > 0 for layer in summary.layers.values())
    assert not any(p.grad is not None for p in backbone.library_state().values())


def test_mixed_rows_equal_tasks_run_alone_in_both_towers(tiny_backbone, images):
    backbone = tiny_backbone()
    router = TaskRouter(["a", "b"])
    randomize(inject(backbone, AdapterConfig(rank=4), router))
    backbone, images = backbone.double(), images.double()  # deep models magnify float32's rounding
    tokens, ids = backbone.tokenize(TEXTS), torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        with router.use(ids):
            mixed = backbone.encode_image(images), backbone.encode_text(tokens), backbone.token_logits(images, tokens)
        for task, name in enumerate(router.task_names):
            rows = ids == task
            with router.use(name):
                alone = (backbone.encode_image(images[rows]), backbone.encode_text(tokens[rows]),
                         backbone.token_logits(images[rows], tokens[rows]))
            for got, wanted in zip(mixed, alone):
                torch.testing.assert_close(got[rows], wanted, atol=1e-6, rtol=1e-6)


def test_off_is_the_frozen_model_bit_for_bit(tiny_backbone, images):
    untouched, backbone = tiny_backbone(), tiny_backbone()
    router = TaskRouter(["a"])
    summary = inject(backbone, AdapterConfig(rank=4), router)
    with torch.no_grad(), router.off():
        fresh = backbone.encode_image(images)
        torch.testing.assert_close(fresh, untouched.model.encode_image(images, normalize=True), atol=1e-6, rtol=0)
        randomize(summary)
        assert torch.equal(backbone.encode_image(images), fresh)
    with torch.no_grad(), router.use("a"):
        assert not torch.allclose(backbone.encode_image(images), fresh, atol=1e-3)


def test_the_decoder_is_causal_and_reads_the_image(tiny_backbone, images):
    backbone = tiny_backbone()
    tokens = backbone.tokenize(TEXTS)[:, :8]
    changed = tokens.clone()
    changed[:, 5] = 7
    with torch.no_grad():
        base = backbone.token_logits(images, tokens)
        torch.testing.assert_close(backbone.token_logits(images, changed)[:, :5], base[:, :5])
        assert not torch.allclose(backbone.token_logits(images.flip(0), tokens)[:, 0], base[:, 0], atol=1e-3)
    assert base.shape == (4, 8, backbone.model.vocab_size)


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "per head"])
@pytest.mark.parametrize("bias", [True, False])
def test_split_attention_equals_multihead_attention(mask, bias):
    source = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True).double().eval()
    split = split_attention(copy.copy(source), "here")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    causal = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)
    masks = {"none": None, "causal": causal, "boolean": causal < 0, "per head": causal.expand(8, 5, 5) * 1}
    expected, _ = source(x, x, x, need_weights=False, attn_mask=masks[mask])
    got, _ = split(x, x, x, need_weights=False, attn_mask=masks[mask])
    torch.testing.assert_close(got, expected)
    assert split.qkv.weight is source.in_proj_weight and split.out_proj.weight is source.out_proj.weight


@pytest.mark.parametrize("source", [nn.MultiheadAttention(16, 4, kdim=8),
                                    nn.MultiheadAttention(16, 4, add_zero_attn=True), nn.Linear(2, 2)])
def test_other_attention_is_refused_with_its_place(source):
    with pytest.raises(UserError, match="text.3"):
        split_attention(source, "text.3")


def test_texts_survive_the_codec(tiny_backbone):
    text = tiny_backbone().text
    ids = text.ids(["a red circle", ""])
    assert ids[1] == [] and text.decode([text.bos_id, *ids[0], text.eos_id]) == "a red circle"
    simple = open_clip.get_tokenizer("ViT-B-32")
    from vl_mtl_lora.backbones.open_clip_text import OpenClipText
    codec = OpenClipText(simple, 77, trims=True)
    assert codec.decode(codec.ids(["a photo of a tiger"])[0]) == "a photo of a tiger"


@pytest.mark.parametrize("arguments,message", [
    ({"library": "openclip", "name": "ViT-B-32"}, "did you mean open_clip"),
    ({"library": "open_clip", "name": "ViT-B-33", "random_weights": True}, "did you mean ViT-B-32"),
    ({"library": "open_clip", "name": "ViT-B-32", "pretrained": "opnai"}, "did you mean openai"),
    ({"library": "open_clip", "name": "ViT-B-32", "randomweights": True}, "no option"),
    ({"library": "open_clip", "name": "local-dir:/nowhere"}, "could not load"),
    ({"library": "open_clip", "name": "RN50", "random_weights": True}, "ModifiedResNet"),
    ({"library": "open_clip", "name": "ViT-B-32-quickgelu", "pretrained": "laion2b_s34b_b79k"}, "nor a tag|take ViT"),
])
def test_what_cannot_be_loaded_is_said_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        load_backbone(**arguments)


def test_a_local_checkpoint_file_is_loaded(tmp_path):
    config = open_clip.get_model_config("ViT-B-32")
    small = {"layers": 1, "width": 64, "head_width": 32}
    config = {**config, "embed_dim": 16, "vision_cfg": {**config["vision_cfg"], **small},
              "text_cfg": {**config["text_cfg"], "width": 16, "heads": 2, "layers": 1}}
    open_clip.factory._MODEL_CONFIGS["tiny-for-test"] = config
    try:
        model = open_clip.create_model("tiny-for-test", load_weights=False)
        file = tmp_path / "weights.pt"
        torch.save(model.state_dict(), file)
        backbone = load_backbone("open_clip", "tiny-for-test", str(file))
    finally:
        del open_clip.factory._MODEL_CONFIGS["tiny-for-test"]
    assert torch.equal(backbone.model.visual.proj, model.visual.proj)


def test_the_activation_follows_the_weights():
    from vl_mtl_lora.backbones.open_clip import _activation

    assert _activation("ViT-B-32", "openai") == {"force_quick_gelu": True}
    assert _activation("ViT-B-32", "laion2b_s34b_b79k") == {} == _activation("ViT-B-32", "weights.pt")


def test_adapters_take_over_the_mode_and_dropout_is_off_in_evaluation(tiny_backbone, images):
    backbone = tiny_backbone()
    router = TaskRouter(["a"])
    randomize(inject(backbone, AdapterConfig(rank=4, dropout=0.5), router))
    with torch.no_grad(), router.use("a"):
        assert torch.equal(backbone.encode_image(images), backbone.encode_image(images))


def test_augmentation_options_are_the_library_s_own(tiny_backbone):
    backbone, noise = tiny_backbone(), Image.effect_noise((40, 40), 90).convert("RGB")
    options = {"scale": [0.5, 1.0], "color_jitter": [0.2, 0.2, 0.2, 0.1], "color_jitter_prob": 1.0}
    transform = backbone.preprocess(True, **options)
    torch.manual_seed(0)
    assert not torch.equal(transform(noise), transform(noise))
    plain = backbone.preprocess(False)
    assert torch.equal(plain(noise), plain(noise)) and plain(noise).shape == (3, 32, 32)
    with pytest.raises(UserError, match="did you mean scale"):
        backbone.preprocess(True, scael=1)
    with pytest.raises(UserError, match="open_clip refuses"):
        backbone.preprocess(True, color_jitter_prob=1.0)


def test_a_failed_inject_leaves_a_backbone_that_can_be_used(tiny_backbone):
    backbone = tiny_backbone()
    with pytest.raises(UserError):
        inject(backbone, AdapterConfig(targets=["nothing"]), TaskRouter(["a"]))
    inject(backbone, AdapterConfig(), TaskRouter(["a"]))


def test_an_unknown_tower_is_refused_once_the_towers_are_known(tiny_backbone):
    router = TaskRouter(["a"])
    inject(tiny_backbone(), AdapterConfig(), router)
    with pytest.raises(UserError, match="did you mean text"):
        router.use(txt="a")


def randomize(summary, scale=0.3):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in summary.layers.values():
            for p in (layer.down, layer.transform, layer.up, layer.mix):
                p.add_(torch.randn(p.shape, generator=generator) * scale)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": (0.5, 1.0), "color_jitter": (0.3, 0.3, 0.3, 0.1)}])
def test_pictures_that_travel_as_bytes_become_the_same_floats(tiny_backbone, train, options):
    backbone = tiny_backbone()
    options = options if train else {}
    photo = Image.effect_noise((90, 70), 80).convert("RGB")
    torch.manual_seed(3)
    plain = torch.stack([backbone.preprocess(train, **options)(photo) for _ in range(3)])
    torch.manual_seed(3)
    sent = torch.stack([backbone.loader_preprocess([options if train else None])[0](photo) for _ in range(3)])
    assert sent.dtype == torch.uint8 and sent.shape == plain.shape and plain.dtype == torch.float32
    assert torch.equal(backbone.scaled(sent), plain)
    with torch.no_grad():
        assert torch.equal(backbone.encode_image(sent), backbone.encode_image(plain))


def test_pictures_of_one_batch_travel_alike(tiny_backbone):
    """Random erasing comes after Normalize: with one such task, the pictures of all are floats."""
    backbone, photo = tiny_backbone(), Image.new("RGB", (40, 40), "red")
    erasing = {"use_timm": True, "re_prob": 1.0}
    kinds = [[t(photo).dtype for t in backbone.loader_preprocess(options)] for options in (
        [None, {}], [None, erasing], [erasing])]
    assert kinds == [[torch.uint8] * 2, [torch.float32] * 2, [torch.float32]]
