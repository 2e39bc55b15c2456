"""The eight tasks by name."""

from benchmarks.gauntlet.tasks.autoencoder import autoencoder
from benchmarks.gauntlet.tasks.finetuning import finetuning
from benchmarks.gauntlet.tasks.images import resnet20, vgg16, vit
from benchmarks.gauntlet.tasks.regression import regression
from benchmarks.gauntlet.tasks.task import TaskFactory
from benchmarks.gauntlet.tasks.text import gpt, lstm

TASKS: dict[str, TaskFactory] = {
    factory.__name__: factory
    for factory in (autoencoder, resnet20, vgg16, gpt, vit, lstm, regression, finetuning)
}
