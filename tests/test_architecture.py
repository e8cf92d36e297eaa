"""The layout: imports go upward only, libraries stay in their place, files stay readable in one sitting."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vl_mtl_lora"
# In import order: a file imports only files above it.
ORDER = ["errors", "ranks", "sections", "config", "routing", "metrics.bootstrap", "metrics.retrieval", "metrics.vqa",
         "metrics.caption", "metrics.classification", "metrics",
         "data.pictures", "data.schema", "data.shards", "data.faults", "data.files", "data.tar",
         "data.records", "data.index",
         "data.mixing", "data.stream",
         "data.survey", "data.contact_sheet", "data.examples", "data", "ops", "attention",
         "backbones.generation", "backbones.base", "backbones.roles", "backbones.prefix", "backbones.open_clip_text",
         "backbones.open_clip_dual", "backbones.open_clip_coca", "backbones.open_clip", "backbones.hf_images",
         "backbones.hf_text", "backbones.hf_dual", "backbones.hf_chat_text", "backbones.hf_chat", "backbones.hf",
         "backbones", "targets", "layer", "variants", "lora",
         "tasks.base", "tasks.retrieval", "tasks.vqa", "tasks.captioning",
         "tasks.classification", "tasks.multiple_choice", "tasks.matching", "tasks",
         "model", "predict", "memory", "flops", "planning", "inspection", "hub", "model_card", "checkpoint_files",
         "checkpoint", "task_sets", "resume", "safe_files", "export", "sources", "importing", "anatomy", "embeddings",
         "evaluate", "journal", "trainer", "bench_loader", "bench_arms", "bench", "results", "evaluation",
         "bench_retrieval", "forgetting", "gallery", "drawings", "report", "compare", "side_by_side", "push",
         "quickstart", "sweep_plan", "sweep_run", "sweep", "sweep_report", "",
         "predict_files", "page", "cli_data", "cli_tasks", "cli", "__main__"]
HOMES = {"open_clip": "backbones", "timm": "backbones", "transformers": "backbones", "webdataset": "data"}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def test_every_file_has_its_place_in_the_order():
    assert sorted(map(module_of, FILES)) == sorted(ORDER)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_upward(path):
    here = ORDER.index(module_of(path))
    for name in imports(path):
        if name.split(".")[0] == "vl_mtl_lora":
            assert ORDER.index(name.removeprefix("vl_mtl_lora").removeprefix(".")) < here, name


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_libraries_stay_in_their_place(path):
    for name in imports(path):
        home = HOMES.get(name.split(".")[0])
        assert home is None or module_of(path).split(".")[0] == home, name


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_have_one_purpose_and_can_be_read_in_one_sitting(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 350


def test_the_readme_s_tree_names_every_file():
    readme = (PACKAGE.parent / "README.md").read_text()
    for path in FILES:
        if path.name != "__init__.py":
            assert path.name in readme, path


def names_compared(tree):
    """Every text that an `if`, a comparison or a match of the file tests for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


@pytest.mark.parametrize("path", [p for p in FILES if not module_of(p).startswith("backbones")], ids=module_of)
def test_no_behaviour_hangs_on_a_library_s_or_a_model_s_name(path):
    words = ("open_clip", "transformers", "timm", "clip", "siglip", "coca", "llava", "qwen", "smolvlm", "intern", "hf")
    formats = {"clip_benchmark"}  # a layout of shards
    for text in names_compared(ast.parse(path.read_text())):
        assert text in formats or not any(word in text.lower() for word in words), text
