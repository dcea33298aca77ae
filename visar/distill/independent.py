"""The baseline of one-step students: all tokens at once, independently, by their frequencies at every position."""

import torch

from visar.distill.dd1 import load_teacher
from visar.distill.options import DistillIndependent
from visar.distill.pairs import Pairs, pairs_folder
from visar.generators.independent import IndependentGenerator
from visar.io.files import replaced_folder
from visar.pipelines.image import ImagePipeline


def distill_independent(options: DistillIndependent) -> str:
    """Counts the codes of a teacher's tokens; see `DistillIndependent`. Returns a line that says what is there.

    Raises:
        ValueError: an option outside its range, a teacher whose pairs cannot be made, or a folder of other pairs.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(options.teacher, device)
    folder = pairs_folder(options.out, options.pairs)
    pairs = Pairs(folder, teacher, block=options.pair_batch, steps=options.flow_steps)
    blocks = -(-options.num_pairs // options.pair_batch)
    pairs.ensure(blocks)
    config, tokens = teacher.generator.config, teacher.generator.num_tokens
    codes, kept = config["vocab_size"], ("num_classes", "attributes", "word_vocab_size")
    counts_N, place_N = torch.zeros(tokens * codes, dtype=torch.int64), codes * torch.arange(tokens)
    for block in range(blocks):
        counts_N += torch.bincount((pairs.load(block)["ids"].long() + place_N).flatten(), minlength=tokens * codes)
    generator = IndependentGenerator(tokens, codes, **{name: config[name] for name in kept})
    generator.set_counts(counts_N.view(tokens, codes))
    model = options.out / "model"
    with replaced_folder(model) as new:
        vocabulary = teacher.config["vocabulary"]
        ImagePipeline(teacher.tokenizer, generator, vocabulary=vocabulary).save_pretrained(new)
    return f"frequencies of {blocks * options.pair_batch} sequences: {model}"
