"""What a finished training or evaluation leaves in its folder, besides checkpoint and metrics.csv: summary.json and
the pictures."""

import contextlib
import json
import platform
import sys

import torch

from caps import MODELS, __version__, backend
from caps.extras import figures, reconstructions
from caps.extras.decoding import mean_squared_error
from caps.extras.runs import DECODED_FILES, write_atomically


def write_results(folder, what, facts, model, scores, result, data, world, history=()):
    """summary.json, confusion.png, roc.png and misclassified.png of a model's class scores [n, J] on the test set of
    `data` and `measure`'s `result`; curves.png of a training's history, rows of metrics.csv; of a model with a decoder
    reconstructions.png and dimensions.png. `what` begins the line that is said.
    """
    if model.decoder:
        facts = facts | {"test_squared_error": mean_squared_error(model.eval(), data.test_images, facts["amp"])}
    title, classes = f"{MODELS[facts['model']].__name__}, {data.title}", data.traits["classes"]
    write_json(folder / "summary.json", facts | {"dataset": data.name, "traits": data.traits, "note": data.note,
                                                 "test_images": len(data.test_images)} | result | environment(world))
    result = result | {"classes": classes}
    if history:
        figures.plot_curves({title: history}, folder / "curves.png")
    figures.plot_confusion({title: result}, folder / "confusion.png")
    figures.plot_roc({title: (scores, data.test_labels, result)}, folder / "roc.png")
    figures.plot_misclassified(data.test_images, scores, data.test_labels, classes, title, folder / "misclassified.png")
    for name in DECODED_FILES:
        (folder / name).unlink(missing_ok=True)  # of another network
    if model.decoder:
        reconstructions.plot_results(model, data.test_images, scores, data.test_labels, classes, title, folder,
                                     facts["amp"])
    auc = "unknown" if result["macro_auc"] is None else f"{result['macro_auc']:.5f}"
    error = f", squared error {facts['test_squared_error']:.2f}" if model.decoder else ""
    print(f"{what}: test accuracy {100 * result['test_accuracy']:.2f} %, macro AUC {auc}{error}; files in {folder}")


def environment(world):
    """What every summary.json says of where it was made; memory is the GPU allocator's peak, or the resident set's."""
    gpu, memory = world.device.type == "cuda", None
    if gpu:
        memory = torch.cuda.max_memory_allocated(world.device)
    else:
        with contextlib.suppress(ImportError):  # on native Windows memory stays unknown
            import resource
            unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss in bytes
            memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "device": torch.cuda.get_device_name(world.device) if gpu else f"cpu, {torch.get_num_threads()} threads",
        "world_size": world.size, "routing_backend": backend(world.device.type)[0],
        "python": platform.python_version(), "torch": torch.__version__, "version": __version__,
        "peak_memory_bytes": memory}


def write_json(path, content):
    write_atomically(path, lambda f: f.write_text(json.dumps(content, indent=1) + "\n"))
