"""How a training step is made faster on the machine at hand; what it computes stays the same, but for rounding.

caps.py train is given this module: `prepare_process` sets the process up, `trained_form` is the model as it is trained,
and `StepGraph` stands in the place of caps.update_weights with --graph. docs/measurements.md has the figures.
"""

import copy
import ctypes
import logging
import os
import signal
import sys
import warnings

import torch

import caps


def prepare_process():
    """Settings of this process, made before its worker threads start, which inherit them."""
    # Adam's moments of idle weights decay to denormal numbers, with which AlexCapsNet's step takes 26 ms instead of 13
    # after two epochs (two cores).
    torch.set_flush_denormal(True)
    keep_freed_memory()


def keep_freed_memory():
    """Let glibc keep what a step frees for the next one, instead of the kernel clearing the same pages at every step.

    On two cores ResCapsNet's step, not compiled, took 310 instead of 396 ms; 15 to 23 % more memory.
    """
    libc = None if sys.platform == "win32" else ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too


def trained_form(model, args, world, data):
    """The model as it is trained on a data set: compiled where that pays, else itself."""
    if not pays_compiling(args, world, len(data.train_images)):
        return model
    if world.rank == 0:
        print(f"caps: compiling {caps.MODELS[args.model].__name__} for training", file=sys.stderr)
    labels = data.train_labels[:args.batch_size] if args.decoder else None
    return compiled(model, data.train_images[:args.batch_size], args.amp, labels)


def pays_compiling(args, world, images):
    """Whether torch.compile's seconds come back: from 100 steps of one process an epoch on.

    The answer is the same for a resumed run, and for any number of processes. With two cores and 32 images ResCapsNet's
    step takes 265 instead of 358 ms, with bf16 118 instead of 205, for some 10 s at the start; AlexCapsNet's takes 7 %
    more, with bf16 16 %. GPUs: not measured.
    """
    return args.model == "rescaps" and world.device.type == "cpu" and images >= 100 * args.batch_size


def compiled(model, images, amp, labels=None):
    """The model as torch.compile makes it for training on uint8 images [B, C, H, W], with its decoder on labels [B] too,
    or itself where that fails.

    BatchNorm, ReLU and additions become fewer passes over tensors of 25 MB. In channels-last order torch's own
    BatchNorm would be almost as fast, but its sums leave 1 to 2 % of error in float32 gradients, these below 0.2 %.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a missing GPU
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # they do, but for axes of one element
    kept = copy.deepcopy(model.state_dict())
    # Ctrl-C ends the process here: in one of the compiler's callbacks KeyboardInterrupt would be printed and forgotten.
    handler = signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    torch.compiler.set_stance("default")  # undoes "eager_on_recompile" of an earlier call
    try:
        # Among kernels in its cache torch 2.11 does not tell those for another number of threads.
        net = torch.compile(model, dynamic=False, options={"cpp.threads": torch.get_num_threads()})
        with caps.autocast(images.device, amp):
            made = net(caps.to_float(images), labels)
        (made if labels is None else made[0].sum() + made[1]).sum().backward()
        torch.compiler.set_stance("eager_on_recompile")  # for an epoch's last, smaller group
    except Exception as error:  # whatever a compiler, or none, leads it to
        print(f"caps: trained without torch.compile, {caps.first_line(error)}", file=sys.stderr)
        net = model
    finally:
        signal.signal(signal.SIGINT, handler)
    model.load_state_dict(kept)  # BatchNorm has counted these images
    model.zero_grad(set_to_none=True)
    return net


class StepGraph:
    """update_weights as one CUDA graph: three full groups run as they are, the fourth is captured, which runs nothing,
    and this and all later ones are replayed. A smaller group runs as it is. UserError where the capture fails.

    A replay reads images `index` [size], `motion` [size, columns] and the learning rate `lr`, float32, where the
    capture did.
    """

    def __init__(self, size, columns, device):
        self.index = torch.zeros(size, dtype=torch.int64, device=device)
        self.motion, self.lr = torch.zeros(size, columns, device=device), torch.zeros((), device=device)
        self.stream, self.graph = torch.cuda.Stream(device), None  # the default stream cannot be captured
        self.eager = 3  # full groups still to run as they are: at first Adam, the scaler, cuBLAS and cuDNN allocate

    def __call__(self, run, index, motion, group_size):
        if group_size < len(self.index):
            caps.update_weights(run, index, motion, group_size)
        elif self.eager:
            self.eager -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                caps.update_weights(run, index, motion, group_size)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self.graph = self.graph or self.capture(run)
            self.index.copy_(index)
            self.motion.copy_(motion)
            self.lr.fill_(run.optimizer.param_groups[0]["lr"])
            self.graph.replay()

    def capture(self, run):
        graph, [group] = torch.cuda.CUDAGraph(), run.optimizer.param_groups
        usual = {key: group[key] for key in ("lr", "capturable")}  # put back, so checkpoints do not tell of the graph
        group.update(lr=self.lr, capturable=True)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                caps.update_weights(run, self.index, self.motion, len(self.index))
        except RuntimeError as error:
            cause = caps.first_line(error.__context__ or error)  # ending a failed capture raises anew
            raise caps.UserError(f"--graph: this step cannot be captured, leave the option out ({cause})") from error
        group.update(usual)
        return graph
