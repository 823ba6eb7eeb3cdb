"""The list of experiments: the modules of ``experiments`` without a leading underscore."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmm_linux import experiments
from vmm_linux._tools.commands import CannotTryError
from vmm_linux.experiments import Run

TEXTS = ("TITLE", "QUESTION", "PREDICTION", "EXPLANATION")


class UnfitError(CannotTryError):
    """No experiment has this name, or a module is none; the text has the name."""


@dataclass(frozen=True)
class Experiment:
    """An experiment, as stated by its module, whose name it has with hyphens."""

    name: str
    order: int
    title: str
    question: str
    prediction: str
    explanation: str
    measure: Callable[[Run], None]

    def texts(self) -> dict[str, str]:
        """The texts for JSON, with the name."""
        return {name: getattr(self, name) for name in ("name", *map(str.lower, TEXTS))}


def catalogue() -> list[Experiment]:
    """All experiments, in their order.

    Errors:
        UnfitError: a module lacks a part of an experiment.
    """
    names = [found.name for found in pkgutil.iter_modules(experiments.__path__)]
    made = [experiment(name) for name in names if not name.startswith("_")]
    return sorted(made, key=lambda each: (each.order, each.name))


def experiment(module_name: str) -> Experiment:
    """The experiment of a module of this folder."""
    try:
        module = importlib.import_module(f"{experiments.__name__}.{module_name}")
    except (ImportError, SyntaxError) as error:
        raise UnfitError(f"{module_name}.py cannot be imported: {error}") from error
    texts = [getattr(module, text, None) for text in TEXTS]
    order, measure = getattr(module, "ORDER", None), getattr(module, "measure", None)
    lacking = [
        name
        for name, fit in (
            ("ORDER, a number", isinstance(order, int)),
            *((f"{name}, a text", bool(text)) for name, text in zip(TEXTS, texts, strict=True)),
            ("measure, a function", callable(measure)),
        )
        if not fit
    ]
    if order is None or measure is None or lacking:
        raise UnfitError(f"{module.__file__} is no experiment: it lacks {'; '.join(lacking)}")
    title, question, prediction, explanation = (" ".join(str(text).split()) for text in texts)
    name = module_name.replace("_", "-")
    return Experiment(name, order, title, question, prediction, explanation, measure)


def chosen(names: Sequence[str]) -> list[Experiment]:
    """The experiments with these names, each once, in the order given.

    Errors:
        UnfitError: an unknown name; the text has the nearest known one.
    """
    known = {each.name: each for each in catalogue()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower().replace("_", "-"), known, 1, 0.4)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UnfitError(
                f"no experiment is called {name!a}{meant} ('vmm-linux experiment list' has all)"
            )
    return [known[name] for name in dict.fromkeys(names)]
