"""Fine-tunes a pretrained raster generator on a folder of images with one subfolder per class.

The classes are the folder's, so the table of classes starts anew; all other weights start from the model. With
--lora RANK only low-rank adapters of the blocks and that table are trained (peft); the adapter is saved by itself, and
merged into the folder that `visar.load` reads.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import visar
from visar.core.condition import Condition
from visar.data.images import load_image_set
from visar.data.vocabulary import Vocabulary
from visar.generators.training import token_loss
from visar.train.token_cache import build_token_cache

LORA_TARGETS = ["wqkv", "wo", "w1", "w2", "w3"]


def with_classes(generator, num_classes: int):
    """A generator of other classes and no attributes or words; weights that fit are the old one's."""
    config = {key: value for key, value in generator.config.items() if not key.startswith("_")}
    changes = dict(num_classes=num_classes, attributes=(), word_vocab_size=0)
    new = type(generator)(**{**config, **changes})
    state = new.state_dict()
    kept = {key: value for key, value in generator.state_dict().items() if key in state}
    kept = {key: value for key, value in kept.items() if value.shape == state[key].shape}
    new.load_state_dict(kept, strict=False)
    print("starts anew:", ", ".join(sorted(state.keys() - kept.keys())) or "nothing")
    return new.to(generator.device)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="images, one subfolder per class")
    parser.add_argument("--model", default="emoji-raster")
    parser.add_argument("--out", type=Path, default=Path("fine_tuned"))
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="rank of adapters; 0 trains all weights")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=None, help="1e-4; 1e-3 for adapters")
    parser.add_argument("--label-dropout", type=float, default=0.1, help="for guidance")
    parser.add_argument("--device", default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    pipe = visar.load(options.model, device=options.device, dtype="float32")
    height, _ = pipe.image_size
    images = load_image_set(options.folder, height)
    classes = images.vocabulary.attributes["class"]
    cache = build_token_cache(images, pipe.tokenizer, batch_size=options.batch_size, device=pipe.device)
    ids_MN = cache.tokens_NKL[:, 0].long().to(pipe.device)
    labels_M = images.labels_NA[:, 0].to(pipe.device)
    model = with_classes(pipe.generator, len(classes))

    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=options.lora, target_modules=LORA_TARGETS, modules_to_save=["cls_embedding"])
        )
        model.print_trainable_parameters()
    rate = options.learning_rate or (1e-3 if options.lora else 1e-4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.95), weight_decay=0.0 if options.lora else 0.05)

    losses = []
    model.train()
    for step in range(options.steps):
        chosen_B = torch.randint(len(ids_MN), (options.batch_size,), device=pipe.device)
        dropped_B = torch.rand(options.batch_size, device=pipe.device) < options.label_dropout
        labels_B = labels_M[chosen_B].masked_fill(dropped_B, len(classes))  # the row after the last is "no class"
        loss = token_loss(model(ids_MN[chosen_B], Condition(labels_BA=labels_B[:, None])), ids_MN[chosen_B])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % max(1, options.steps // 10) == 0:
            print(f"step {step}: {losses[-1]:.3f} nats per token")

    model.eval()
    if options.lora:
        model.save_pretrained(options.out / "adapter")
        model = model.merge_and_unload()
    vocabulary = Vocabulary({"class": tuple(classes)})
    tuned = visar.ImagePipeline(pipe.tokenizer, model, vocabulary.to_dict(), dict(pipe.config["defaults"]))
    tuned.save_pretrained(options.out / "model")
    print(f"visar sample {options.out / 'model'} --class {classes[0]!r}")
    return losses


if __name__ == "__main__":
    main()
