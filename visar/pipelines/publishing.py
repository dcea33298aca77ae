"""Pipelines as repositories of the Hugging Face hub, with a card that carries the protocol of their figures."""

import os
from pathlib import Path
from typing import Any

from visar.checkpoints import hub
from visar.io.files import read_text, sha256


def model_card(
    pipeline: Any, repository: str, folder: Path, *, evaluation: Path | None, licence: str | None, about: str
) -> str:
    """README.md of a repository: what the model is, how it is loaded and sampled, its figures and their protocol.

    Args:
        pipeline: that is published.
        repository: owner/model.
        folder: where the pipeline was saved; digests of its weights are told.
        evaluation: folder that `visar eval` wrote, whose card is taken in whole; None says that there are no figures.
        licence: of the weights, by the hub's name, such as apache-2.0; None says nothing.
        about: further text in Markdown: data, training, limits.

    Raises:
        ValueError: no card in the evaluation's folder.
    """
    config = pipeline.generator.config
    texts = bool(config.get("caption_width") or config.get("word_vocab_size"))
    head = [
        "library_name: diffusers",
        f"pipeline_tag: {'text-to-image' if texts else 'unconditional-image-generation'}",
    ]
    head += [] if licence is None else [f"license: {licence}"]
    call = 'prompt="..."' if config.get("caption_width") or not config["num_classes"] else "class_labels=0"
    if evaluation is None:
        figures = "No figures were measured for this repository."
    else:
        figures = read_text(evaluation / "card.md").strip().replace("\n#", "\n##").replace("# ", "## ", 1)
    weights = [f"- {path.relative_to(folder)}: {sha256(path)}" for path in sorted(folder.rglob("*.safetensors"))]
    return "\n".join(
        [
            "---",
            *head,
            "tags: [visar, autoregressive]",
            "---",
            "",
            f"# {repository.split('/')[-1]}",
            "",
            "```",
            repr(pipeline),
            "```",
            "",
            *([about.strip(), ""] if about.strip() else []),
            "## Use",
            "",
            "With [visar](https://pypi.org/project/torch-visar/) installed, and no code of this repository run:",
            "",
            "```python",
            "import visar",
            "",
            f'pipe = visar.load("{repository}")',
            f"image = pipe({call}, seed=0).images[0]",
            "```",
            "",
            "By diffusers, which runs the few lines of pipeline.py that import visar:",
            "",
            "```python",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{repository}", trust_remote_code=True)',
            "```",
            "",
            figures,
            "",
            "## Weights (sha256)",
            "",
            *weights,
            "",
        ]
    )


def publish(
    folder: Path,
    repository: str,
    *,
    private: bool | None,
    token: str | bool | None,
    message: str,
    create_pr: bool,
    revision: str | None,
) -> str:
    """Makes a repository where there is none, and puts a folder's files into it.

    Returns: address of the commit.

    Raises:
        ValueError: a name that is none, no network, or no right to it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        made = huggingface_hub.create_repo(repository, private=private, token=token, exist_ok=True)
        done = huggingface_hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            token=token,
            commit_message=message,
            create_pr=create_pr,
            revision=revision,
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise ValueError(
            f"{repository} could not be written on the Hugging Face hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'})"
        ) from error
    return str(getattr(done, "commit_url", done))


def check_repository(name: str | os.PathLike) -> str:
    """The name, if it is one of a repository.

    Raises:
        ValueError: it is not of the form owner/model.
    """
    text = os.fspath(name)
    if not hub.REPOSITORY.fullmatch(text):
        raise ValueError(f"repository {text!r}; write owner/model")
    return text
