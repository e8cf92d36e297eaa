"""Imported adapters, reloaded from their checkpoint, compute what they did where they were trained.

References: PEFT itself for its LoRA; for the other two a float64 restatement of the formula, read in their sources:
`mLoRALinear.forward` in src/adapter/mlora.py of the paper's code, `MTLLoRA.forward` in src/adapters/methods/lora.py of
the adapters library.
"""

import json
import math
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny_models
from vl_mtl_lora import load_backbone, parse_config
from vl_mtl_lora.checkpoint import load_run
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.importing import import_adapters
from vl_mtl_lora.trainer import train

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TASKS = ("vqa", "captioning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of transformers, by name."""
    made = {}
    for name in ("hf_clip", "hf_llava"):
        made[name] = tmp_path_factory.mktemp(name)
        getattr(tiny_models, name)(made[name])
    return made


@pytest.fixture
def config(folders, tmp_path):
    """Returns a function that gives a config for a model and adapter settings."""
    def make(model="hf_clip", tasks=TASKS, **adapter):
        return parse_config({
            "out": str(tmp_path / "run"), "backbone": {"library": "transformers", "name": str(folders[model])},
            "adapter": {"rank": 4, "alpha": 8, **adapter},
            "tasks": {task: {"kind": "captioning", "train": "none.tar"} for task in tasks}})
    return make


def reloaded(source, config):
    """What was told, and the model that the checkpoint holds."""
    told = import_adapters(source, config)
    return told, load_run(config.out, "cpu")[0]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# -- PEFT -------------------------------------------------------------------------------------------------------------


def peft_lora(folder, out, **options):
    """A LoRA of PEFT with random A and B on a tiny model, saved; returns PEFT's own model."""
    auto = transformers.AutoModel if "clip" in folder.name else transformers.AutoModelForImageTextToText
    model = peft.get_peft_model(auto.from_pretrained(folder), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * random(*parameter.shape, seed=i))
    model.eval().save_pretrained(out)
    return model


def inputs_of(name):
    pixels = random(2, 3, 16, 16)
    if name == "hf_clip":
        return {"pixel_values": pixels, "input_ids": torch.tensor([[2, 9, 10, 11, 3], [2, 12, 9, 3, 0]])}
    return {"pixel_values": pixels, "input_ids": torch.tensor([[2] + [4] * 16 + [9, 10], [2] + [4] * 16 + [12, 11]])}


def outputs(model, name):
    """In float64, so that what differs is not rounding."""
    inputs = inputs_of(name)
    with torch.no_grad():
        out = model.double()(**inputs | {"pixel_values": inputs["pixel_values"].double()})
    return [out.logits] if "logits" in out else [out.image_embeds, out.text_embeds, out.logits_per_image]


@pytest.mark.parametrize("model,options,adapter", [
    ("hf_clip", {"target_modules": ["q_proj", "v_proj", "fc1"]}, {"targets": ["attn.q", "attn.v", "mlp.in"]}),
    ("hf_clip", {"target_modules": ["k_proj", "out_proj", "fc2"], "use_rslora": True}, {"rank": 6, "alpha": 5}),
    ("hf_clip", {"target_modules": ["q_proj", "fc2"], "alpha_pattern": {"fc2": 3, r"text.*\.0\..*q_proj": 20},
                 "rank_pattern": {"layers.1.mlp.fc2": 2}}, {"num_up": 1}),
    ("hf_llava", {"target_modules": r".*(layers\.[01]\..*(q_proj|o_proj|gate_proj|down_proj)|linear_1)"},
     {"transform": "diagonal"})])
def test_every_task_of_an_imported_lora_computes_what_peft_does(folders, config, tmp_path, model, options, adapter):
    theirs = peft_lora(folders[model], tmp_path / "lora", **options)
    wanted, plain = outputs(theirs, model), outputs(theirs.unload(), model)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(wanted, plain))
    _, ours = reloaded(tmp_path / "lora", config(model, **adapter))
    for task in TASKS:
        with ours.router.use(task):
            for got, want in zip(outputs(ours.backbone.model, model), wanted):
                torch.testing.assert_close(got, want, **CLOSE)


def test_layers_that_the_model_never_reads_are_left_out_and_others_stay_fresh(folders, config, tmp_path):
    """LLaVA's last vision block: PEFT adapts it too, and its B stays zero."""
    theirs = peft_lora(folders["hf_llava"], tmp_path / "lora", target_modules=["fc1"])
    with torch.no_grad():
        theirs.get_submodule("base_model.model.model.vision_tower.encoder.layers.2.mlp.fc1.lora_B.default").weight.zero_()
    theirs.save_pretrained(tmp_path / "lora")
    told, ours = reloaded(tmp_path / "lora", config("hf_llava", targets=["image.mlp"]))
    assert told == ["3 layers of PEFT for 2 tasks",
                    "left out, since they compute nothing (B is zero): model.vision_tower.encoder.layers.2.mlp.fc1 "
                    "(1 in all)",
                    "not in the source, so fresh, which changes nothing: image.0.mlp.out, image.1.mlp.out (2 in all)"]
    with ours.router.use("vqa"):
        torch.testing.assert_close(outputs(ours.backbone.model, "hf_llava"), outputs(theirs, "hf_llava"), **CLOSE)


@pytest.mark.parametrize("rename", [
    lambda name: name.replace(".model.model.language_model.", ".model.language_model.model.").replace(
        ".model.model.vision_tower.", ".model.vision_tower.vision_model."),  # transformers 4.51
    lambda name: name.replace(".vision_tower.", ".vision_tower.vision_model.")])  # 4.57
def test_names_of_earlier_releases_are_known(folders, config, tmp_path, rename):
    theirs = peft_lora(folders["hf_llava"], tmp_path / "lora", target_modules=r".*(layers\.[01]\.).*(v_proj|fc2)")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    renamed = {rename(name): tensor for name, tensor in load_file(file).items()}
    assert renamed.keys() != load_file(file).keys()
    file.unlink()
    torch.save(renamed, tmp_path / "lora" / "adapter_model.bin")
    _, ours = reloaded(tmp_path / "lora", config("hf_llava"))
    with ours.router.use("captioning"):
        torch.testing.assert_close(outputs(ours.backbone.model, "hf_llava"), outputs(theirs, "hf_llava"), **CLOSE)


def clip_lora(folder, layers):
    """A LoRA folder as PEFT writes it, of rank 4 and alpha 8: layer -> (inputs, outputs). Returns the deltas."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    tensors = {}
    for i, (name, (size, out)) in enumerate(layers.items()):
        tensors[f"base_model.model.{name}.lora_A.weight"] = random(4, size, seed=i)
        tensors[f"base_model.model.{name}.lora_B.weight"] = random(out, 4, seed=i)
    save_file(tensors, folder / "adapter_model.safetensors")
    return {name: 2 * tensors[f"base_model.model.{name}.lora_B.weight"].double()
            @ tensors[f"base_model.model.{name}.lora_A.weight"].double() for name in layers}


OPEN_CLIP = {"vision_model.encoder.layers.0.self_attn.q_proj": (32, 32),
             "vision_model.encoder.layers.1.self_attn.v_proj": (32, 32),
             "vision_model.encoder.layers.1.mlp.fc2": (128, 32),
             "text_model.encoder.layers.0.self_attn.k_proj": (24, 24),
             "text_model.encoder.layers.1.self_attn.out_proj": (24, 24),
             "text_model.encoder.layers.1.mlp.fc1": (24, 96)}


def test_a_lora_of_transformers_clip_fits_open_clip_s_fused_attention(tiny_config, tiny_folder, tmp_path):
    deltas = clip_lora(tmp_path / "lora", OPEN_CLIP)
    _, ours = reloaded(tmp_path / "lora", tiny_config())
    plain = load_backbone("open_clip", f"local-dir:{tiny_folder}")
    state = plain.model.state_dict()
    for name, delta in deltas.items():
        tower, block, layer = re.fullmatch(r"(\w+)_model\.encoder\.layers\.(\d)\.(.+)", name).groups()
        own = {"self_attn.out_proj": "attn.out_proj.weight", "mlp.fc1": "mlp.c_fc.weight",
               "mlp.fc2": "mlp.c_proj.weight"}.get(layer, "attn.in_proj_weight")
        weight = state[("visual." if tower == "vision" else "") + f"transformer.resblocks.{block}.{own}"]
        if own == "attn.in_proj_weight":
            weight = weight.chunk(3)["qkv".index(layer.split(".")[1][0])]
        weight += delta.float()
    images, tokens = random(2, 3, 32, 32), plain.tokenize(["a red shape", "the color is blue"])
    with torch.no_grad():
        for task in ours.tasks:
            with ours.router.use(task):
                torch.testing.assert_close(ours.backbone.encode_image(images), plain.encode_image(images), **CLOSE)
                torch.testing.assert_close(ours.backbone.encode_text(tokens), plain.encode_text(tokens), **CLOSE)


def test_a_fused_projection_s_lora_is_split_into_its_slices(tmp_path):
    tiny_models.hf_qwen2_5_vl(tmp_path / "model")
    theirs = peft_lora(tmp_path / "model", tmp_path / "lora", target_modules=["qkv"])
    _, ours = reloaded(tmp_path / "lora", parse_config({
        "out": str(tmp_path / "run"), "backbone": {"library": "transformers", "name": str(tmp_path / "model")},
        "adapter": {"rank": 4, "targets": ["image.attn"]}, "tasks": {"captioning": {"train": "none.tar"}}}))
    path, x = "model.visual.blocks.1.attn.qkv", random(3, 32)
    with torch.no_grad(), ours.router.use("captioning"):
        torch.testing.assert_close(ours.backbone.model.get_submodule(path)(x),
                                   theirs.get_submodule(f"base_model.model.{path}")(x), **CLOSE)


# -- the paper's code, and the adapters library -----------------------------------------------------------------------


def softmax(values):
    top = [math.exp(value - max(values)) for value in values]
    return [value / sum(top) for value in top]


def paper_tensors(layers, tasks=2, num_up=3, rank=4, diagonal=False):
    """What `save_pretrain` of the paper's code writes: layer -> (inputs, outputs)."""
    return {f"{name}.{part}": random(*shape, seed=i)
            for i, (name, (size, out)) in enumerate(layers.items())
            for part, shape in {"lora_A": (1, rank, size), "lora_B": (num_up, out, rank), "lora_B_w": (tasks, num_up),
                                "lora_lambdas": (tasks, rank) if diagonal else (tasks, rank, rank)}.items()}


PAPER = {f"model.layers.{i}.self_attn.{part}_proj": (32, 32) for i in (0, 1) for part in "qo"}
PAPER_ADAPTER = {"targets": ["text.attn"], "temperature": 0.1}


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_paper_s_checkpoints_compute_the_same(config, tmp_path, diagonal):
    tensors = paper_tensors(PAPER, diagonal=diagonal)
    (tmp_path / "source" / "checkpoint").mkdir(parents=True)
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()},
               tmp_path / "source" / "checkpoint" / "final_checkpoint.pt")
    told, ours = reloaded(tmp_path / "source", config(
        "hf_llava", transform="diagonal" if diagonal else "full", **PAPER_ADAPTER))
    assert told[0] == "4 layers of the paper's code for 2 tasks" and "text.0.attn.k, text.0.attn.v" in told[1]
    x = random(5, 32).double()
    for name in PAPER:
        layer = ours.backbone.model.get_submodule(name.replace("model.", "model.language_model.", 1)).double()
        own = {part: tensors[f"{name}.{part}"].double() for part in ("lora_A", "lora_B", "lora_B_w", "lora_lambdas")}
        for t, task in enumerate(TASKS):
            weights = softmax([float(w) / 0.1 for w in own["lora_B_w"][t]])
            middle = torch.diag(own["lora_lambdas"][t]) if diagonal else own["lora_lambdas"][t]
            for row in x:
                up = sum(weight * b for weight, b in zip(weights, own["lora_B"]))
                want = layer.weight.double() @ row + 8 / 4 * (up @ (middle @ (own["lora_A"][0] @ row)))
                with ours.router.use(task), torch.no_grad():
                    torch.testing.assert_close(layer(row.view(1, 1, -1))[0, 0], want, rtol=1e-5, atol=1e-5)


LIBRARY = {f"{tower}_model.encoder.layers.{i}.{part}": shape for tower, width in (("text", 32), ("vision", 48))
           for i in (0, 1) for part, shape in {"self_attn.q_proj": (width, width), "mlp.fc2": (64, width)}.items()}
LIBRARY_ADAPTER = {"alpha": 8, "num_up": 3, "temperature": 0.05, "transform": "diagonal"}


def library_folder(folder, layers, tasks=TASKS, **config):
    """What `save_all_adapters` of the adapters library writes; returns the tensors."""
    everything = {}
    for t, task in enumerate(tasks):
        (folder / task).mkdir(parents=True)
        (folder / task / "adapter_config.json").write_text(json.dumps({"name": task, "model_type": "clip", "config": {
            "architecture": "mtl_lora", "r": 4, "alpha": 8, "n_up_projection": 3, "weights_sharpness": 0.05,
            "task_specific_matrix_type": "singular_values", **config}}))
        tensors = {}
        for i, (name, (size, out)) in enumerate(layers.items()):
            parts = {"lora_A": random(4, size, seed=i), "lora_B": random(3, out, 4, seed=i),
                     "task_specific.values": random(4, seed=10 * t + i),
                     "weights": 1 + 0.1 * random(3, seed=10 * t + i)}
            tensors |= {f"{name}.loras.{task}.{part}": tensor for part, tensor in parts.items()}
        if t:
            save_file(tensors, folder / task / "adapter.safetensors")
        else:
            torch.save(tensors, folder / task / "pytorch_adapter.bin")
        everything |= tensors
    return everything


def test_the_adapters_library_s_adapters_compute_the_same(config, tmp_path):
    tensors = library_folder(tmp_path / "source", LIBRARY)
    # Their folders are in the order of the alphabet, and the config's tasks need not be.
    _, ours = reloaded(tmp_path / "source", config(**LIBRARY_ADAPTER))
    for name, (size, _) in LIBRARY.items():
        layer, x = ours.backbone.model.get_submodule(name).double(), random(5, size).double()
        for task in TASKS:
            own = {part: tensors[f"{name}.loras.{task}.{part}"].double()
                   for part in ("lora_A", "lora_B", "task_specific.values", "weights")}
            weights = softmax([float(w) / 0.05 for w in own["weights"]])
            low = x @ own["lora_A"].T @ torch.diag(own["task_specific.values"])
            want = x @ layer.weight.double().T + layer.bias.double()
            for weight, up in zip(weights, own["lora_B"]):
                want = want + 8 / 4 * weight * (low @ up.T)
            with ours.router.use(task), torch.no_grad():
                torch.testing.assert_close(layer(x.unsqueeze(0))[0], want, rtol=1e-5, atol=1e-5)


# -- afterwards -------------------------------------------------------------------------------------------------------


def test_training_starts_from_what_was_imported(tiny_config, tmp_path):
    clip_lora(tmp_path / "lora", OPEN_CLIP)
    settings = tiny_config(steps=2)
    _, ours = reloaded(tmp_path / "lora", settings)
    batches, losses = [], []
    train(settings, resume=True, on_batch=batches.append, on_step=lambda step, values: losses.append(values))
    assert len(losses) == 2
    with torch.no_grad():
        assert {name: float(loss) for name, loss in ours(batches[0]).items()} == pytest.approx(losses[0], rel=1e-5)


def test_the_command_writes_a_checkpoint_that_others_take(command, tiny_config, tmp_path):
    from vl_mtl_lora.config import dump_config

    clip_lora(tmp_path / "lora", OPEN_CLIP)
    (tmp_path / "run.yaml").write_text(dump_config(tiny_config()))
    out = tmp_path / "run"
    code, told, _ = command("import", tmp_path / "lora", tmp_path / "run.yaml")
    assert code == 0 and told.startswith("6 layers of PEFT for 3 tasks\n") and f"checkpoint: {out}/last" in told
    assert "imported from lora, trained with PEFT" in (out / "last" / "README.md").read_text()
    assert command("evaluate", out, "--limit", "4")[0] == 0
    assert command("export", out, "--task", "vqa")[0] == 0
    code, _, error = command("import", tmp_path / "lora", tmp_path / "run.yaml")
    assert code == 2 and "already holds a run" in error


# -- what is refused --------------------------------------------------------------------------------------------------


def edited(folder, **changes):
    """Changes a PEFT folder's settings (config=) or tensors (name -> tensor, or None to take it away)."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes.pop("config", {})))
    tensors = load_file(folder / "adapter_model.safetensors") | changes.pop("tensors", {})
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None},
              folder / "adapter_model.safetensors")


Q = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_"
HEAD = "base_model.model.visual_projection.lora_"


@pytest.mark.parametrize("changes,adapter,message", [
    ({"config": {"use_dora": True}}, {}, "use_dora is 'True'; only a plain LoRA"),
    ({"config": {"modules_to_save": ["head"]}}, {}, "modules_to_save is"),
    ({"config": {"some_new_kind": {"a": 1}}}, {}, "some_new_kind is"),
    ({"config": {"bias": "all"}}, {}, "trained biases"),
    ({"config": {"init_lora_weights": "pissa"}}, {}, "changes the base's weights"),
    ({"config": {"peft_type": "IA3"}}, {}, "expected LORA"),
    ({"config": {"r": "4"}}, {}, "r must be a positive number, got '4'"),
    ({"config": {"alpha_pattern": {"q_proj": float("inf")}}}, {}, "q_proj must be a positive number"),
    ({"config": {"rank_pattern": {"(": 2}}}, {}, "rank_pattern: "),
    ({"config": {"rank_pattern": [3]}}, {}, "rank_pattern must be a JSON object"),
    ({"tensors": {f"{Q}A.weight": random(3, 32)}}, {}, "shape (3, 32), expected (4, any)"),
    ({"tensors": {f"{Q}A.weight": random(4, 31)}}, {}, "takes 31 and gives 32 numbers, the backbone's text.0"),
    ({"tensors": {f"{Q}B.weight": random(31, 4)}}, {}, "gives 31"),
    ({"tensors": {f"{Q}B.weight": None}}, {}, "q_proj has no lora_B.weight"),
    ({"tensors": {f"{Q}B.bias": random(32)}}, {}, "1 tensors are no part of the adapters"),
    ({"tensors": {f"{Q}B.weight": random(32, 4) / 0}}, {}, "holds a value that is no number"),
    ({"tensors": {f"{Q}B.weight": torch.ones(32, 4, dtype=torch.int64)}}, {}, "no tensor of floating-point numbers"),
    ({"tensors": {f"{HEAD}A.weight": random(4, 32), f"{HEAD}B.weight": random(24, 4)}}, {},
     "no adaptable layer visual_projection (1 in all)"),
    ({}, {"targets": ["image", "text.attn.v"]}, "write adapter.targets=[text.attn.q]"),
    ({}, {"rank": 2}, "write adapter.rank=4")])
def test_a_lora_that_cannot_be_computed_is_refused_in_one_line(config, tmp_path, changes, adapter, message):
    clip_lora(tmp_path / "lora", {"text_model.encoder.layers.0.self_attn.q_proj": (32, 32)})
    edited(tmp_path / "lora", **changes)
    refused(tmp_path / "lora", config(**adapter), message)


def refused(source, config, message):
    with pytest.raises(UserError) as error:
        import_adapters(source, config)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (source.parent / "run").exists()


@pytest.mark.parametrize("changes,adapter,message", [
    ({}, {"temperature": None}, "does not save temperature: write adapter.temperature=VALUE (its --temperature"),
    ({}, {"rank": 8, "num_up": 2}, "write adapter.rank=4 adapter.num_up=3"),
    ({}, {"tasks": ("vqa",)}, "are of 2 tasks, numbered, the config has 1 (vqa)"),
    ({"model.embed_tokens.weight": random(9, 9)}, {}, "model.embed_tokens.weight; the base stays frozen here"),
    ({"model.layers.0.self_attn.q_proj.lora_B_w": None}, {}, "q_proj has no lora_B_w"),
    ({"model.layers.0.self_attn.q_proj.lora_lambdas": random(3, 4, 4)}, {}, "expected (2, 4, 4)"),
    ({"model.layers.0.self_attn.q_proj.lora_A": torch.tensor(1.0)}, {}, "expected (1, 4, any)"),
    ({f"model.layers.7.self_attn.q_proj.{name.rpartition('.')[2]}": tensor for name, tensor in
      paper_tensors({"q": (32, 32)}).items()}, {}, "no adaptable layer model.layers.7.self_attn.q_proj"),
    ({"model.layers.0.self_attn.q_proj.lora_B": torch.ones(1).expand(3, 10**9, 4)}, {}, "and has other data")])
def test_a_checkpoint_of_the_paper_s_code_that_does_not_fit_is_refused(config, tmp_path, changes, adapter, message):
    tensors = paper_tensors(PAPER) | changes
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "final.pt")
    settings = {**PAPER_ADAPTER, **adapter}
    settings = {name: value for name, value in settings.items() if value is not None}
    refused(tmp_path / "final.pt", config("hf_llava", **settings), message)


@pytest.mark.parametrize("config_of_source,adapter,message", [
    ({}, {"temperature": 0.5, "transform": "full"}, "write adapter.temperature=0.05 adapter.transform=diagonal"),
    ({}, {"tasks": ("vqa", "caption")}, "the adapters are captioning, vqa, the config's tasks caption, vqa"),
    ({"task_specific_matrix_type": "linear"}, {}, "cannot build the other"),
    ({"architecture": "lora"}, {}, "with architecture mtl_lora")])
def test_adapters_of_the_library_that_do_not_fit_are_refused(config, tmp_path, config_of_source, adapter, message):
    library_folder(tmp_path / "source", LIBRARY, **config_of_source)
    refused(tmp_path / "source", config(**{**LIBRARY_ADAPTER, **adapter}), message)


def test_adapters_of_the_library_that_share_nothing_are_refused(config, tmp_path):
    library_folder(tmp_path / "source", LIBRARY)
    file = tmp_path / "source" / "captioning" / "adapter.safetensors"
    save_file({name: tensor + ("lora_A" in name) for name, tensor in load_file(file).items()}, file)
    refused(tmp_path / "source", config(**LIBRARY_ADAPTER), "has another lora_A or lora_B for each task")


class Trap:
    def __reduce__(self):
        return print, ("this was run",)


def test_files_that_are_no_adapters_are_refused_and_nothing_in_them_runs(config, tmp_path, capsys):
    torch.save({"a.lora_lambdas": Trap()}, tmp_path / "trap.pt")
    refused(tmp_path / "trap.pt", config(), "as tensors and nothing else")
    assert "this was run" not in capsys.readouterr().out
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", config(), "no checkpoint of the paper's code")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    refused(tmp_path / "broken.safetensors", config(), "cannot read")
    refused(tmp_path / "nowhere", config(), "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", config(), "nothing to import; expected adapter_config.json")
    for text, message in (("[" * 100_000, "cannot read"), ("3", "expected a JSON object"), ("{}", "neither PEFT's"),
                          ('{"format": "vl_mtl_lora/1"}', "it needs no import"), ('{"peft_type": "LORA"}', "weights")):
        (tmp_path / "empty" / "adapter_config.json").write_text(text)
        refused(tmp_path / "empty", config(), message)
