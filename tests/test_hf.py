"""Loading transformers' models: dry runs of real sizes, quantised bases, chat texts, and what is refused."""

import pytest
import torch
from PIL import Image
from torch import nn

from tests import tiny_models
from tests.test_open_clip import randomize
from vl_mtl_lora import AdapterConfig, TaskRouter, UserError, build_model, inject, load_backbone, load_run, parse_config
from vl_mtl_lora.backbones.hf_images import Pictures
from vl_mtl_lora.export import merged_state
from vl_mtl_lora.model import check_gradients, example_batch
from vl_mtl_lora.trainer import train


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_models.hf_llava(tmp_path_factory.mktemp("llava"))


def config_of(folder, shards="a", **options):
    split = {"train": shards, "valid": shards}
    return {"backbone": {"library": "transformers", "name": folder, "options": options},
            "adapter": {"rank": 4, "alpha": 8},
            "tasks": {"vqa": {"rows": 4, "answers": ["red", "green", "blue", "yellow"], **split},
                      "captioning": {"rows": 4, "num_beams": 1, "max_new_tokens": 3, **split}},
            "data": {"ignore_tasks": ["retrieval"], "shuffle": 8},
            "train": {"steps": 15, "lr": 0.01, "warmup": 0, "eval_samples": 6}}


@pytest.mark.parametrize("kind,module,parameter", [("4bit", "bitsandbytes", "Params4bit"),
                                                   ("8bit", "torchao", "Int8Tensor")])
def test_adapters_learn_on_a_quantised_language_model(llava, tiny_shards, tmp_path, kind, module, parameter):
    pytest.importorskip(module)
    config = parse_config({"out": str(tmp_path / "run"),
                           **config_of(llava, str(tiny_shards / "mixed-*.tar"), quantize=kind, dtype="bfloat16")})
    model = build_model(config)
    quantised = {name for name, layer in model.summary.layers.items() if not layer.plain}
    assert quantised == {name for name in model.summary.layers if name.startswith("text.")}
    assert {type(model.summary.layers[name].base.weight).__name__ for name in quantised} == {parameter}
    assert {p.dtype for p in model.adapter_state().values()} == {torch.float32}
    check_gradients(model)
    # A layer is its frozen product plus the update that the same adapter makes on a plain layer.
    layer = model.summary.layers["text.0.attn.q"]
    randomize(model.summary)
    x = torch.randn(2, 3, layer.in_features).bfloat16()
    with torch.no_grad(), model.router.use("vqa"):
        down, up = layer.fold(0)
        update = torch.einsum("bli,ri,ro->blo", x.float(), down[0], up[0])
        torch.testing.assert_close(layer(x).float(), layer.base(x).float() + update, atol=0.1, rtol=0.05)
    with pytest.raises(UserError, match="cannot be merged into"):
        merged_state(model, "vqa")
    losses = {}
    train(config, on_step=lambda step, loss: losses.update({step: sum(loss.values())}))
    assert sum(losses[s] for s in (13, 14, 15)) < sum(losses[s] for s in (1, 2, 3))
    assert load_run(config.out)[0].summary.layers.keys() == model.summary.layers.keys()


def test_the_library_goes_by_two_names(llava):
    first, second = (load_backbone(library, llava).library_state() for library in ("hf", "transformers"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_missing_package_for_quantisation_is_named(llava, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'vl_mtl_lora\[quantize\]'"):
        load_backbone("transformers", llava, quantize="4bit")


@pytest.mark.parametrize("arguments,message", [
    ({"name": "/nowhere/at/all"}, "could not load '/nowhere/at/all'"),
    ({"name": "LLAVA", "pretrained": "x"}, "come with backbone.name"),
    ({"name": "LLAVA", "dtype": "bf16"}, "options.dtype: got 'bf16'; did you mean bfloat16|valid are"),
    ({"name": "LLAVA", "dtype": "float16"}, "options.dtype: got 'float16'"),
    ({"name": "CLIP", "quantize": "8bit"}, "only chat models are quantised, got a clip"),
    ({"name": "PALIGEMMA"}, "reads whole prompts in both directions"),
    ({"name": "LLAVA", "quantize": "3bit"}, "did you mean 8bit or 4bit|did you mean 4bit or 8bit"),
    ({"name": "LLAVA", "dtyp": "bfloat16"}, "did you mean dtype"),
    ({"name": "BERT"}, "of type bert; supported are clip, siglip, siglip2"),
])
def test_what_cannot_be_loaded_is_said_in_one_line(llava, tmp_path, arguments, message):
    from transformers import BertConfig

    tiny_models.tokenizer().save_pretrained(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    made = {"CLIP": tiny_models.hf_clip, "PALIGEMMA": tiny_models.hf_paligemma}
    name = {"LLAVA": llava, "BERT": str(tmp_path)}.get(arguments["name"], arguments["name"])
    if name in made:
        name = made[name](tmp_path / "made")
    with pytest.raises(UserError, match=message) as caught:
        load_backbone("transformers", **{**arguments, "name": name})
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_an_error_and_random_ones_are_asked_for(llava, tmp_path):
    import shutil

    folder = shutil.copytree(llava, tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="could not load the weights"):
        load_backbone("transformers", str(folder))
    assert load_backbone("transformers", str(folder), random_weights=True).random_weights


@pytest.mark.parametrize("name,parameters,image,text", [
    ("llava-hf/llava-1.5-7b-hf", 7_063_427_072, {"attn.q": 23, "mlp.in": 23, "projector.1": 1}, {"mlp.gate": 32}),
    ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976, {"attn.qkv": 32, "mlp.gate": 32, "projector.2": 1}, {"attn.k": 36})])
def test_real_sizes_are_injected_on_the_meta_device(name, parameters, image, text):
    backbone = load_backbone("transformers", name, dry_run="shapes", dtype="bfloat16")
    assert sum(p.numel() for p in backbone.model.parameters()) == parameters
    summary = inject(backbone, AdapterConfig(rank=8), TaskRouter(["a", "b"]))
    for tower, roles in (("image", image), ("text", text)):
        for role, count in roles.items():
            assert sum(p.tower == tower and p.role == role for p in summary.places.values()) == count
    assert {p.device.type for p in backbone.parameters()} == {"meta"}
    narrow = load_backbone("transformers", name, dry_run="narrow")
    assert inject(narrow, AdapterConfig(rank=8), TaskRouter(["a", "b"])).layers.keys() == summary.layers.keys()


def test_a_chat_text_is_the_template_s_and_holds_no_smuggled_picture(llava):
    text = load_backbone("transformers", llava).text
    tokens = text.tokenizer
    (row,) = text.prompts(["what color is <image> it?"], [1])
    assert row.count(text.image_id) == 1
    assert tokens.decode(row) == tokens.decode(tokens("USER: <image>\nwhat color is  it? ASSISTANT:").input_ids)
    assert text.eos_id == tokens.eos_token_id
    assert text.decode([*text.ids(["red circle"])[0], text.eos_id, 7]) == "red circle"
    assert text.rows(["a", "a red circle"]).shape[0] == 2 and text.image_id not in text.rows(["a <image>"])
    assert text.ids(["red <image> <eos> circle"]) == text.ids(["red circle"])


def test_a_template_for_messages_of_one_text_and_none_at_all_are_followed(llava):
    from vl_mtl_lora.backbones.hf_chat import HFChat

    backbone = load_backbone("transformers", llava)
    processor = backbone.processor
    text = "{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}"
    for template, rendered in ((text, "[<image>\nwhat]"), (None, "<image>\nwhat\n")):
        processor.chat_template = template
        assert HFChat(backbone.model, processor, 100).text.render("what", 1) == rendered
    processor.chat_template = "{{ 'nothing' }}"
    with pytest.raises(UserError, match="shows no user's text with a picture"):
        HFChat(backbone.model, processor, 100)
    processor.chat_template, processor.patch_size = None, None
    with pytest.raises(UserError, match="the LlavaProcessor of this model fails on a picture"):
        HFChat(backbone.model, processor, 100)


def test_a_text_too_long_loses_its_middle_and_the_template_and_the_instruction_stay(llava):
    text = load_backbone("transformers", llava, max_length=30).text
    short, long = text.prompts(["a", "green " + "red " * 60 + "describe the picture"], [5, 5])
    assert len(long) == 25 and long[-2:] == short[-2:] and long.count(text.image_id) == 1
    words = text.tokenizer.decode(long)
    assert "green red" in words and "red describe the picture" in words
    (row,) = text.rows(["red " * 60]).tolist()
    assert len(row) <= 30 and "summarize the sentence in one word" in text.tokenizer.decode(row)


def test_generation_does_not_follow_the_model_s_own_settings(llava):
    backbone = load_backbone("transformers", llava)
    image = backbone.collate_images([backbone.preprocess(False)(Image.new("RGB", (20, 20), "red"))])
    said = backbone.generate(image, ["what color is it?"], max_new_tokens=6)
    backbone.model.generation_config.repetition_penalty = 50.0
    backbone.model.generation_config.no_repeat_ngram_size = 1
    assert backbone.generate(image, ["what color is it?"], max_new_tokens=6) == said


def test_a_model_that_changes_its_logits_is_refused(llava):
    from vl_mtl_lora.backbones.hf_chat import HFChat

    backbone = load_backbone("transformers", llava)
    model, plain = backbone.model, backbone.model.forward
    model.config.text_config.logits_scaling = 2.0
    HFChat(model, backbone.processor, 100)  # the config says so, and the model does not do it

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits / 2
        return out

    model.forward = forward
    with pytest.raises(UserError, match=r"changes its logits \(logits_scaling\)"):
        HFChat(model, backbone.processor, 100)


def test_a_processor_that_rearranges_texts_or_tells_more_is_refused(llava, monkeypatch):
    from transformers import LlavaProcessor

    plain = LlavaProcessor.__call__
    monkeypatch.setattr(LlavaProcessor, "__call__", lambda self, *args, text, **kwargs: plain(
        self, *args, text=[t.replace("ASSISTANT:", "") for t in text], **kwargs))
    with pytest.raises(UserError, match="its processor rearranges texts"):
        load_backbone("transformers", llava)

    def more(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out["position_ids"] = out["input_ids"]
        return out

    monkeypatch.setattr(LlavaProcessor, "__call__", more)
    with pytest.raises(UserError, match="it reads position_ids of its processor"):
        load_backbone("transformers", llava)


def test_inspect_counts_what_a_quantised_base_will_take():
    from vl_mtl_lora.inspection import inspect

    pytest.importorskip("bitsandbytes")
    config = {"out": "x", **config_of("llava-hf/llava-1.5-7b-hf", dtype="bfloat16", quantize="4bit")}
    line = next(inspect(parse_config(config)))
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # of the language model; 4 bits, and a scale for 64 values
    size = 2 * (7_063_427_072 - layers) + layers * (0.5 + 4 / 64)
    assert line.endswith(f"7,063,427,072 frozen parameters, {size / 1e9:.1f} GB as 4bit")


def test_pictures_are_joined_and_told_apart():
    def one(crops, tokens):
        return Pictures.of_one({"pixel_values": torch.full((1, crops, 3, 2, 2), float(crops)),
                                "image_sizes": torch.tensor([[crops, 1]])}, tokens)

    joined = Pictures.join([one(2, [7, 7]), Pictures.join([one(3, [7]), one(1, [7, 7, 7])], one_row=True)])
    assert joined.inputs["pixel_values"].shape == (3, 3, 3, 2, 2) and not joined.inputs["pixel_values"][0, 2].any()
    assert joined.inputs["image_sizes"].tolist() == [[2, 1], [3, 1], [1, 1]]
    assert joined.counts == [1, 2] and joined.rows == [2, 3, 1] and joined.tokens == [[7, 7], [7], [7, 7, 7]]
    assert len(joined) == 2 and joined.to("cpu").counts == joined.counts


def test_placeholders_and_pictures_must_agree(llava):
    backbone = load_backbone("transformers", llava)
    image = backbone.collate_images([backbone.preprocess(False)(Image.new("RGB", (20, 20)))])
    with pytest.raises(ValueError, match="2 placeholders for its 1 pictures"):
        backbone.token_logits(image, torch.tensor([[backbone.text.image_id, backbone.text.image_id]]))


def test_training_augmentation_cuts_out_a_part_and_knows_its_options(llava):
    backbone, noise = load_backbone("transformers", llava), Image.effect_noise((40, 40), 90).convert("RGB")
    transform = backbone.preprocess(True, scale=(0.5, 0.6))
    torch.manual_seed(0)
    first, second = transform(noise), transform(noise)
    assert not torch.equal(first.inputs["pixel_values"], second.inputs["pixel_values"])
    plain = backbone.preprocess(False)
    assert torch.equal(plain(noise).inputs["pixel_values"], plain(noise).inputs["pixel_values"])
    with pytest.raises(UserError, match="did you mean scale"):
        backbone.preprocess(True, scael=1)


def test_any_mode_of_picture_goes_through_the_model_s_own_preprocessing(llava, tiny_backbone):
    for backbone in (load_backbone("transformers", llava), tiny_backbone()):
        transform = backbone.preprocess(False)

        def pixels(image, transform=transform):
            out = transform(image)
            return out if isinstance(out, torch.Tensor) else out.inputs["pixel_values"]

        red = pixels(Image.new("RGB", (20, 20), (255, 0, 0)))
        assert torch.equal(pixels(Image.new("RGBA", (20, 20), (255, 0, 0, 255))), red)
        assert torch.equal(pixels(Image.new("RGB", (20, 20), (255, 0, 0)).convert("P")), red)
        rotated = Image.new("RGB", (20, 20), "white")
        rotated.paste((0, 0, 0), (0, 0, 20, 10))  # black above, stored lying on its side
        exif = rotated.getexif()
        exif[0x0112] = 6
        upright = rotated.transpose(Image.Transpose.ROTATE_270)
        rotated.info["exif"] = exif.tobytes()
        assert torch.equal(pixels(rotated), pixels(upright))


@pytest.mark.parametrize("dry_run", [None, "narrow"])
def test_expected_memory_is_near_what_autograd_keeps(llava, dry_run):
    from vl_mtl_lora.memory import expected_memory

    data = config_of(llava)
    for task in data["tasks"].values():
        task["rows"] = 16
    config = parse_config({"out": "x", **data})
    model = build_model(config)
    probe = build_model(config, dry_run=dry_run) if dry_run else model
    memory, loss = expected_memory(model, probe, config)
    assert torch.isfinite(loss) and loss.requires_grad
    permanent = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in permanent:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(example_batch(model, 16))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert losses and 0.85 * measured < memory.activations < 1.15 * measured
    assert memory.weights == sum(p.numel() * 4 for p in model.backbone.parameters() if not p.requires_grad)
    assert memory.trained == 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.checkpointed < memory.activations / 2
    assert memory.total(True) == memory.weights + memory.trained + memory.checkpointed


def test_layers_of_unknown_names_are_left_out_and_said_so(llava):
    backbone = load_backbone("transformers", llava)
    block = backbone.model.model.language_model.layers[0]
    block.mlp.strange = nn.Linear(3, 3)
    summary = inject(backbone, AdapterConfig(), TaskRouter(["a"]))
    assert summary.left_out["text.0.mlp.strange"] == "its name tells no role"
