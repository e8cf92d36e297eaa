"""Exports are loaded by the libraries that they are for, and compute what the routed model does."""

import json

import open_clip
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from tests import tiny_models
from tests.test_open_clip import randomize
from vl_mtl_lora import load_backbone, parse_config
from vl_mtl_lora.checkpoint import load_run, save_checkpoint
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.export import export
from vl_mtl_lora.model import build_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns a function from a tiny model's name to its library and its name there."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = getattr(tiny_models, kind)(tmp_path_factory.mktemp(kind))
            made[kind] = ("transformers", folder) if kind.startswith("hf_") else ("open_clip", f"local-dir:{folder}")
        return made[kind]
    return make


@pytest.fixture
def trained(base, tmp_path):
    """Returns a function that writes a run with random adapters and returns its folder and its model."""
    def make(kind, other="captioning", backbone=None, **adapter):
        config = parse_config({
            "out": str(tmp_path / "run"), "backbone": backbone or dict(zip(("library", "name"), base(kind))),
            "adapter": {"rank": 4, "alpha": 6, **adapter},
            "tasks": {"other": {"kind": other, "train": "none.tar"}, "retrieval": {"train": "none.tar"}}})
        model = build_model(config)
        randomize(model.summary)
        save_checkpoint(tmp_path / "run" / "last", model, config, step=1)
        return tmp_path / "run", load_run(tmp_path / "run", "cpu")[0]
    return make


def tiny_picture(seed):
    colours = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(colours.numpy())


def embedded(model, images, tokens):
    with torch.no_grad():
        return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)


def routed(model, task, images, tokens):
    with torch.no_grad(), model.router.use(task):
        return model.backbone.encode_image(images), model.backbone.encode_text(tokens)


def close(got, wanted, plain):
    for ours, theirs, before in zip(wanted, got, plain):
        assert (ours - before).abs().max() > 0.01  # the adapters do something
        torch.testing.assert_close(theirs, ours, **CLOSE)


# -- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["oc_siglip", "oc_timm_vit", "oc_eva02", "oc_coca", "oc_hf_text", "ViT-S-32-alt"])
def test_open_clip_loads_a_merged_folder(trained, tmp_path, kind):
    """The last one is of open_clip's own, by a plain name, with a tokenizer that comes with it."""
    backbone = None
    if own := kind == "ViT-S-32-alt":
        torch.save(open_clip.create_model(kind).state_dict(), tmp_path / "weights.pt")
        backbone = {"library": "open_clip", "name": kind, "pretrained": str(tmp_path / "weights.pt")}
    run, model = trained(kind, "retrieval", backbone)
    export(run, "retrieval", tmp_path / "out")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    backbone = model.backbone
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a red circle", "blue ?"])
    assert torch.equal(tokens, backbone.tokenize(["a red circle", "blue ?"]))
    assert torch.equal(preprocess(tiny_picture(0)), backbone.preprocess(False)(tiny_picture(0)))
    size = backbone.model.visual.image_size
    images = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    with model.router.off(), torch.no_grad():
        plain = backbone.encode_image(images), backbone.encode_text(tokens)
    wanted = routed(model, "retrieval", images, tokens)
    close(embedded(theirs.eval(), images, tokens), wanted, plain)
    if own:
        weights = str(tmp_path / "out" / "open_clip_model.safetensors")
        close(embedded(open_clip.create_model(kind, pretrained=weights).eval(), images, tokens), wanted, plain)


@pytest.mark.parametrize("kind", ["hf_clip", "hf_siglip", "hf_siglip2", "hf_llava", "hf_qwen2_5_vl", "hf_qwen3_vl",
                                  "hf_internvl"])
def test_transformers_loads_a_merged_folder(trained, base, tmp_path, kind):
    run, model = trained(kind)
    export(run, "retrieval", tmp_path / "out")
    auto = transformers.AutoModelForImageTextToText if model.backbone.writes else transformers.AutoModel
    _, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain, theirs = (load_backbone("transformers", str(name)).eval() for name in (base(kind)[1], tmp_path / "out"))
    pictures = [theirs.preprocess(False)(tiny_picture(i)) for i in range(2)]
    images, tokens = theirs.collate_images(pictures), theirs.tokenize(["a red circle", "blue ?"])
    assert torch.equal(tokens, model.backbone.tokenize(["a red circle", "blue ?"]))
    before, got = ((b.encode_image(images), b.encode_text(tokens)) for b in (plain, theirs))
    close(got, routed(model, "retrieval", images, tokens), before)


# -- PEFT -------------------------------------------------------------------------------------------------------------


def peft_loads(folder, plain, outputs):
    """What stock PEFT's model computes with the export on a plain model, and after it has merged it."""
    before = outputs(plain)
    model = peft.PeftModel.from_pretrained(plain, folder).eval()
    with torch.no_grad():
        return before, outputs(model), outputs(model.merge_and_unload())


@pytest.mark.parametrize("kind,adapter", [
    ("hf_clip", {}), ("hf_clip", {"transform": "diagonal", "targets": ["attn.q", "attn.v"]}),
    ("hf_siglip", {"targets": ["text", "image.*.attn", "image.*.mlp"]}), ("hf_llava", {}),
    ("hf_qwen2_5_vl", {}), ("hf_qwen2_5_vl", {"targets": ["image.attn.v", "text.attn.q"]}), ("hf_qwen3_vl", {}),
    ("hf_internvl", {})])
def test_peft_loads_an_export(trained, base, tmp_path, kind, adapter):
    """Qwen's image tower has fused qkv layers in transformers too: one LoRA of three times the rank."""
    run, model = trained(kind, "retrieval", **adapter)
    export(run, "retrieval", tmp_path / "out", "peft")
    backbone = load_backbone("transformers", base(kind)[1]).eval()
    images = backbone.collate_images([backbone.preprocess(False)(tiny_picture(i)) for i in range(2)])
    tokens = backbone.tokenize(["a red circle", "blue ?"])

    def outputs(theirs):
        backbone.model = theirs.get_base_model() if isinstance(theirs, peft.PeftModel) else theirs
        with torch.no_grad():
            return backbone.encode_image(images), backbone.encode_text(tokens)

    before, got, merged = peft_loads(tmp_path / "out", backbone.model, outputs)
    for some in (got, merged):
        close(some, routed(model, "retrieval", images, tokens), before)
    auto = peft.AutoPeftModel.from_pretrained(tmp_path / "out")
    assert type(auto.get_base_model()) is type(model.backbone.model)


def hf_clip_of(model):
    """open_clip's CLIP with its own ViT as transformers' CLIPModel, weight for weight."""
    visual, heads = model.visual, lambda block: block.attn.num_heads
    towers = {"vision": (visual.transformer, {"image_size": visual.image_size[0], "patch_size": visual.patch_size[0]}),
              "text": (model.transformer, {"vocab_size": model.vocab_size, "eos_token_id": 2,
                                           "max_position_embeddings": model.context_length})}
    configs = {f"{name}_config": {
        "hidden_size": tower.width, "intermediate_size": tower.resblocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": tower.layers, "num_attention_heads": heads(tower.resblocks[0]), "hidden_act": "gelu",
        **more} for name, (tower, more) in towers.items()}
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**configs, projection_dim=visual.output_dim))
    state = {
        "logit_scale": model.logit_scale, "visual_projection.weight": visual.proj.T,
        "text_projection.weight": model.text_projection.T,
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding}
    norms = {"text_model.final_layer_norm": model.ln_final, "vision_model.pre_layrnorm": visual.ln_pre,
             "vision_model.post_layernorm": visual.ln_post}
    for name, (tower, _) in towers.items():
        for i, block in enumerate(tower.resblocks):
            stem = f"{name}_model.encoder.layers.{i}"
            norms |= {f"{stem}.layer_norm1": block.ln_1, f"{stem}.layer_norm2": block.ln_2,
                      f"{stem}.mlp.fc1": block.mlp.c_fc, f"{stem}.mlp.fc2": block.mlp.c_proj,
                      f"{stem}.self_attn.out_proj": block.attn.out_proj}
            for part, weight, bias in zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)):
                state |= {f"{stem}.self_attn.{part}_proj.weight": weight, f"{stem}.self_attn.{part}_proj.bias": bias}
    state |= {f"{name}.{part}": getattr(layer, part) for name, layer in norms.items() for part in ("weight", "bias")}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and not missing
    return theirs.eval()


@pytest.mark.parametrize("adapter", [{}, {"targets": ["attn.qkv"]}, {"targets": ["image.attn.k", "text.mlp"]}])
def test_peft_loads_the_export_of_an_open_clip_model_on_transformers_clip(trained, tmp_path, adapter):
    run, model = trained("", backbone={"library": "open_clip", "name": "micro-clip"}, **adapter)
    export(run, "retrieval", tmp_path / "out", "peft")
    plain = hf_clip_of(load_backbone("open_clip", "micro-clip").model)
    images = torch.randn(2, 3, *model.backbone.model.visual.image_size)
    tokens = model.backbone.tokenize(["a red circle", "blue"])
    lengths = tokens.argmax(dim=1)

    def outputs(theirs):
        with torch.no_grad():
            image = theirs.get_image_features(pixel_values=images).pooler_output
            text = theirs.text_model(input_ids=tokens).last_hidden_state[torch.arange(2), lengths]
            return [torch.nn.functional.normalize(x, dim=-1) for x in (image, theirs.text_projection(text))]

    before, got, merged = peft_loads(tmp_path / "out", plain, outputs)
    for some in (got, merged):
        torch.testing.assert_close(some, list(routed(model, "retrieval", images, tokens)), **CLOSE)
    assert max((a - b).abs().max() for a, b in zip(got, before)) > 0.01


def test_an_exported_lora_is_the_formula_in_float64(trained, tmp_path):
    run, model = trained("hf_clip", alpha=6, rank=4)
    export(run, "retrieval", tmp_path / "out", "peft")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    layer, task = model.summary.layers["text.1.mlp.in"], model.router.index("retrieval")
    weights = torch.softmax(layer.mix[0, task].double() / layer.temperature, 0)
    up = sum(weight * b.double().T for weight, b in zip(weights, layer.up[0]))
    wanted = 6 / 4 * up @ layer.transform[0, task].double() @ layer.down[0].double()
    stem = "base_model.model.text_model.encoder.layers.1.mlp.fc1.lora_{}.weight"
    torch.testing.assert_close(tensors[stem.format("B")].double() @ tensors[stem.format("A")].double(), wanted, **CLOSE)


def test_a_quantised_base_is_exported_as_a_lora(trained, base, tmp_path):
    pytest.importorskip("torchao")
    run, model = trained("hf_llava")
    for path in (run / "last").glob("adapter_config.json"):
        description = json.loads(path.read_text())
        description["config"]["backbone"]["options"]["quantize"] = "8bit"
        description["base"] = build_model(parse_config(description["config"])).fingerprint
        path.write_text(json.dumps(description))
    with pytest.raises(UserError, match="cannot be merged into; --format peft writes the task without the base"):
        export(run, "retrieval", tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.part").exists()
    export(run, "retrieval", tmp_path / "out", "peft")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    down, up = model.summary.layers["text.0.mlp.in"].fold(model.router.index("retrieval"))
    stem = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_{}.weight"
    assert torch.equal(tensors[stem.format("A")], down[0]) and torch.equal(tensors[stem.format("B")], up[0].T)


# -- what cannot be, and what is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,adapter,message", [
    ("oc_coca", {}, "transformers has no model with a linear layer for"),
    ("oc_eva02", {"targets": ["image"]}, r"image\.0\.attn\.q"),
    ("hf_siglip", {}, r"image\.pool\.q.*adapter\.targets"),
    ("oc_hf_text", {"targets": ["text"]}, "no model with a linear layer for text")])
def test_layers_that_peft_cannot_hold_are_named(trained, tmp_path, kind, adapter, message):
    run, _ = trained(kind, "retrieval", **adapter)
    with pytest.raises(UserError, match=message):
        export(run, "retrieval", tmp_path / "out", "peft")
    assert not list(tmp_path.glob("out*"))


def test_the_command_writes_new_folders_only_and_tells_what_it_leaves_out(trained, command, tmp_path):
    run, _ = trained("", backbone={"library": "open_clip", "name": "micro-clip"})
    code, text, _ = command("export", run, "--task", "retrieval")
    assert code == 0 and f"merged: {run / 'merged-retrieval'}" in text and "image.projector" in text
    assert "log_scale" in text
    before = {path: path.read_bytes() for path in (run / "merged-retrieval").iterdir()}
    code, _, text = command("export", run, "--task", "retrieval")
    assert code != 0 and "is in use: name another folder, or remove it" in text
    assert before == {path: path.read_bytes() for path in (run / "merged-retrieval").iterdir()}
    (tmp_path / "empty").mkdir()
    assert command("export", run, "--task", "other", "--format", "peft", "--out", tmp_path / "empty")[0] == 0
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["adapter_config.json",
                                                                            "adapter_model.safetensors"]
    for options, message in ((["--task", "retrievel"], "did you mean retrieval"),
                             (["--task", "other", "--format", "pef"], "did you mean peft"),
                             (["--task", "other", "--out", run / "last" / "results.json"], "is in use")):
        code, _, text = command("export", run, *options)
        assert code != 0 and message in text and "Traceback" not in text, text


def test_an_export_that_cannot_be_written_leaves_nothing(trained, tmp_path, monkeypatch):
    run, _ = trained("hf_clip")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vl_mtl_lora.export.save_file", full)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        export(run, "other", tmp_path / "out", "peft")
    assert not list(tmp_path.glob("out*"))
