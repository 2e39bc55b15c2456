"""The order of the pages, which the index shows beside every one of them."""

from __future__ import annotations

from sphinx.application import Sphinx

CONTENTS = {
    "Understand": [
        "methods",
        "fisher",
        "step",
        "How it is built <design>",
    ],
    "Use": [
        "settings",
        "troubleshooting",
        "coming-from",
        "program",
    ],
    "Recipes": [
        "recipes/loop",
        "recipes/precision",
        "recipes/checkpoints",
        "recipes/finetuning",
        "recipes/transformers",
        "recipes/autoencoders",
        "recipes/gans",
        "recipes/outputs",
        "ranks",
        "recipes/frameworks",
    ],
    "Galleries": [
        "galleries/spectrum",
        "galleries/theorem",
        "galleries/digits",
        "galleries/gpt",
    ],
    "Measurements": [
        "../results/README",
        "../benchmarks/README",
    ],
    "Reference": [
        "reference/optimizers",
        "reference/damping",
        "reference/likelihoods",
        "reference/blocks",
    ],
    "Project": [
        "../CONTRIBUTING",
        "../CHANGELOG",
        "../SECURITY",
    ],
}


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == app.config.root_doc:
        for caption, pages in CONTENTS.items():
            lines = ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
            source[0] += "\n".join(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
