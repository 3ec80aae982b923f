"""Weights of 8 or 4 bits: a model that is smaller, and whose tokens need fewer bytes to be read.

int8: a scale for each output, symmetric, w = code * scale, scale = max |w| / 127.
int4: a scale and a zero for each group of 32 inputs, w = (code - 8) * scale + zero, the range of a
group narrowed where that brings the weights nearer; embedding and head, of which every bit counts
more, stay int8.

A Quantized stands where a model has a matrix: F.linear, @ and F.embedding take it. Few rows go
through kernels/decoding.py where the model has its ops, which reads the codes themselves, else
through PyTorch's CPU ops (names that may change: where one is missing, or refuses a shape, the
matrix is dequantised as it is for many rows). Only the template says which matrices those are
(Model.quantizable); other templates have all their large parameters rounded to the same values, so
that the loss is what it would be, and no speed.

Small parameters, norms and gates, keep their precision. Scales and zeros are bf16.
"""

import torch
import torch.nn.functional as F

from base import InputError
from kernels.decoding import matrix_of_codes

KINDS = ("int8", "int4")
GROUP = 32  # inputs that share a scale, of int4
NARROWED = (1.0, 0.95, 0.9, 0.85, 0.8)  # tried for the range of a group
FEW_ROWS = 8  # of activations, up to which the ops are faster than dequantising
LEAST = 4096  # weights in a parameter that is rounded


def quantize(model, kind):
    """Quantize a model in place. Returns bits per weight over all of its parameters. Raises
    InputError for an unknown kind."""
    if kind not in KINDS:
        raise InputError(f"--quantize {kind}: expected {' or '.join(KINDS)}")
    n = sum(p.numel() for p in model.parameters())
    bits = 0
    quantizable = getattr(model, "quantizable", None)
    with torch.no_grad():
        if quantizable is None:
            bits = round_in_place(model, kind)
        else:
            bits = replace_matrices(model, kind, quantizable)
    return bits / n


def replace_matrices(model, kind, quantizable):
    """Put Quantized in the places that the template names. Returns bits of all weights."""
    layers = []
    bits = 0
    decoding = model.ops.decoding
    for layer in model.layers():
        new = {
            field: Quantized(getattr(layer, field), kind, transposed, decoding)
            for field, transposed in quantizable["layer"].items()
        }
        bits += sum(matrix.bits for matrix in new.values())
        layers.append(layer._replace(**new))
    tables = [name for name in quantizable["tables"] if model.get_parameter(name).numel()]
    for name in tables:
        table = Quantized(model.get_parameter(name).detach(), "int8", decoding=decoding)
        delattr(model, name)  # a module takes no other object for a parameter
        setattr(model, name, table)
        bits += table.bits
    for name in quantizable["banks"]:  # which the layers no longer need
        delattr(model, name)
    model.layers = lambda: layers
    if decoding:
        matrices = [x for layer in layers for x in layer if isinstance(x, Quantized)]
        matrices += [getattr(model, name) for name in tables]
        in_one_piece(matrices, decoding)
    return bits + sum(p.numel() * p.element_size() * 8 for p in model.parameters())


def in_one_piece(matrices, decoding):
    """Put the codes of matrices into one piece of memory, which is read faster than many."""
    alike = [x for x in matrices if x.matrix]
    memory = torch.empty(sum(x.codes.nbytes for x in alike), dtype=torch.uint8)
    decoding.in_large_pages([memory])
    for x, part in zip(alike, memory.split([x.codes.nbytes for x in alike])):
        x.put_codes(part.view(x.codes.dtype).view(x.codes.shape).copy_(x.codes))


def round_in_place(model, kind):
    """Give large parameters the values that codes would have. Returns bits of all weights."""
    tables = [name for name, p in model.named_parameters() if p.dim() == 2 and len(p) > 1024]
    bits = 0
    for name, p in model.named_parameters():
        if p.dim() < 2 or p.numel() < LEAST or p.size(-1) % GROUP:
            bits += p.numel() * p.element_size() * 8
            continue
        matrix = Quantized(p.detach().flatten(0, -2), "int8" if name in tables else kind)
        p.copy_(matrix.dequantized().view_as(p))
        bits += matrix.bits
    return bits


class Quantized:
    """A matrix (out, in) of codes, in place of a tensor; transposed: the tensor was (in, out);
    decoding: a kernels.decoding.Decoding for products with few rows, or None."""

    def __init__(self, w, kind, transposed=False, decoding=None):
        self.transposed = transposed
        self.decoding = decoding if w.device.type == "cpu" else None
        self.dtype = w.dtype
        self.device = w.device
        matrix = (w.t() if transposed else w).float().contiguous()  # which the ops want
        if kind == "int4" and matrix.size(1) % GROUP:
            kind = "int8"  # of a width that has no whole groups
        self.kind = kind
        self.shape = w.shape
        # (out,), or of int4 (out, 2, in / 32): scales and zeros
        codes, self.scales = int8_codes(matrix) if kind == "int8" else int4_codes(matrix)
        two_each = codes if kind == "int8" else codes[:, ::2] | (codes[:, 1::2] << 4)
        self.put_codes(two_each.contiguous())
        self.bits = 8 * self.codes.nbytes + 8 * self.scales.nbytes
        # Of PyTorch's op
        self.has_op = False
        if self.matrix is None and self.device.type == "cpu":
            if kind == "int8":
                self.packed = self.codes
            else:
                self.packed = packed_int4(codes)
                self.op_scales = self.scales.permute(2, 0, 1).contiguous()
            self.has_op = self.works()

    def put_codes(self, codes):
        """Have the codes here; matrix: decoding.c's, or None where that is not used."""
        self.codes = codes
        self.matrix = None
        if self.decoding:
            self.matrix = matrix_of_codes(self.kind, codes, self.scales)

    def works(self):
        """Whether PyTorch has an op for it that takes these shapes. With other widths than
        multiples of 16 some numbers of outputs crash it."""
        if self.n_inputs % 16:
            return False
        try:
            x = torch.zeros(1, self.n_inputs, dtype=torch.bfloat16)
            return self.product(x).shape == (1, len(self.codes))
        except (AttributeError, RuntimeError, TypeError):
            return False

    @property
    def n_inputs(self):
        return self.shape[0] if self.transposed else self.shape[1]

    # --- As far as models look at a matrix

    def __len__(self):
        return self.shape[0]

    def dim(self):
        return 2

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def numel(self):
        return self.shape[0] * self.shape[1]

    def element_size(self):
        return self.codes.element_size()

    def __getitem__(self, rows):
        """The first rows of it, as a head leaves out what pads it."""
        if rows.start or rows.step or self.transposed or self.kind != "int8":
            raise TypeError("of a quantized matrix only the first rows can be taken, of int8")
        first = object.__new__(Quantized)
        first.__dict__.update(self.__dict__)
        first.scales = self.scales[rows]
        first.put_codes(self.codes[rows])
        first.packed = first.codes
        first.shape = torch.Size([len(first.codes), self.shape[1]])
        return first

    # --- What is done with it

    def dequantized(self, rows=None):
        """(out, in) in the dtype it had, or only some rows of it."""
        if self.matrix and rows is None:
            return self.decoding.dequantized(self.matrix, self.dtype)
        codes = self.codes if rows is None else self.codes[rows]
        scales = self.scales if rows is None else self.scales[rows]
        if self.kind == "int8":
            return codes.to(self.dtype) * scales[..., None].to(self.dtype)
        n, half = codes.shape
        pairs = torch.stack([codes & 15, codes >> 4], dim=2).view(n, -1, GROUP)
        scale, zero = scales.float().unbind(1)  # (out, groups) each
        return (
            ((pairs.float() - 8) * scale[..., None] + zero[..., None])
            .view(n, 2 * half)
            .to(self.dtype)
        )

    def product(self, x):
        """(M, in) bf16 -> (M, out), by an op that reads the codes."""
        if self.kind == "int8":
            return torch.ops.aten._weight_int8pack_mm(x, self.packed, self.scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.op_scales)

    def linear(self, x):
        """(..., in) -> (..., out)."""
        if self.matrix:
            y = self.decoding.linear_codes(x, self.matrix)
            if y is not None:
                return y
        rows = x.reshape(-1, x.size(-1))
        if self.has_op and len(rows) <= FEW_ROWS:
            y = self.product(rows.to(torch.bfloat16)).to(x.dtype)
        else:
            y = F.linear(rows, self.dequantized().to(x.dtype))
        return y.view(*x.shape[:-1], -1)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear and (len(args) < 3 or args[2] is None):
            return args[1].linear(args[0])
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
            if args[1].transposed:
                return args[1].linear(args[0])
        if function is F.embedding:
            index, table = args[:2]
            return table.dequantized(index)
        return NotImplemented


def int8_codes(w):
    """(out, in) int8 and (out,) bf16 scales of a matrix in fp32."""
    scales = (w.abs().amax(1) / 127).clamp(min=1e-12).to(torch.bfloat16)
    codes = (w / scales[:, None].float()).round().clamp(-128, 127)
    return codes.to(torch.int8), scales


def int4_codes(w):
    """(out, in) uint8 from 0 to 15, and (out, 2, in / 32) bf16 scales and zeros."""
    groups = w.view(len(w), -1, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    best = None
    for share in NARROWED:
        scale = ((high - low) * share / 15).clamp(min=1e-10).to(torch.bfloat16)
        zero = (0.5 * (low + high) + 0.5 * scale.float()).to(torch.bfloat16)  # what code 8 is
        off = (groups - zero[..., None].float()) / scale[..., None].float()
        codes = (off.round() + 8).clamp(0, 15)
        made = (codes - 8) * scale[..., None].float() + zero[..., None].float()
        error = (made - groups).square().sum(2)
        if best is None:
            best = [error, codes, scale, zero]
            continue
        nearer = error < best[0]
        best[0] = torch.where(nearer, error, best[0])
        best[1] = torch.where(nearer[..., None], codes, best[1])
        best[2] = torch.where(nearer, scale, best[2])
        best[3] = torch.where(nearer, zero, best[3])
    _, codes, scale, zero = best
    return codes.view_as(w).to(torch.uint8), torch.stack([scale, zero], dim=1)


def packed_int4(codes):
    """What the CPU op reads, or None where there is none."""
    try:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (AttributeError, RuntimeError):
        return None
