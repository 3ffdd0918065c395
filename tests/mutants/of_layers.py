"""Mutants of the decoder layers: the ops, their place in a model, and their C++ kernels."""

from __future__ import annotations

from tests.mutants.mutant import OPS, mutants_of

FUSED = "tests/model/test_fused_layers.py"
NORM = "tests/ops/test_rms_norm.py"
MLP = "tests/ops/test_gated_mlp.py"

LAYERS = [
    *mutants_of(
        OPS + "rms_norm.py",
        NORM,
        ("no mean in the gradient", "d - normalised * (d * normalised).mean(1, keepdim=True)", "d"),
        ("rounds too late", "    if rounds_first:\n        normalised = normalised.to(x.dtype)\n", ""),
        ("no offset in the gradient", "d = accurate(grad) * (accurate(weight) + offset)", "d = accurate(grad) * accurate(weight)"),
        ("a frozen weight costs a gradient", "d_weight if need_weight else None", "d_weight"),
        ("strided rows reach the kernel", "    x = x.contiguous()\n    out, inverse", "    out, inverse"),
    ),
    *mutants_of(
        OPS + "gated_mlp.py",
        MLP,
        ("a bend without its cube", "bent = scale * x * (1 + cubic * x * x)", "bent = scale * x"),
        ("a slope without its cube", "(1 + 3 * cubic * x * x)", "(1 + cubic * x * x)"),
        ("act is not rounded", "accurate((x * _share(x, activation)[0]).to(gate.dtype))", "accurate(x * _share(x, activation)[0])"),
        ("the last block is left out", "for start in range(0, num_rows, BLOCK_ROWS):", "for start in range(0, num_rows - BLOCK_ROWS + 1, BLOCK_ROWS):"),
        ("only the last block counts in a weight's gradient", "self.weight, accumulate=True", "self.weight, accumulate=False"),
        ("sums in the inputs' dtype", "high = accumulator(weight.dtype)\n        self.backend", "high = weight.dtype\n        self.backend"),
        ("a bias is forgotten", "torch.addmm(bias, x, weight.t(), out=out)", "torch.mm(x, weight.t(), out=out)"),
        ("up's part of dx replaces that of gate", "matmul(d_up[block], up, target, accumulate=True", "matmul(d_up[block], up, target, accumulate=False"),
        ("gate and up change places", "_gated(gates[place], ups[place]", "_gated(ups[place], gates[place]"),
        ("all rows are kept without gradients", "place = rows if keep else block", "place = rows"),
        ("rows that nobody asks for are kept", "keep = wants_gradient(*tensors)", "keep = True"),
    ),
    *mutants_of(
        "selm_fast/model/fused_layers.py",
        FUSED,
        ("a forward bound to the first of its class", "module.forward = MethodType(forward, module)", "module.forward = lambda x, m=module: forward(m, x)"),
        ("somebody else's forward is replaced", 'if "forward" in module.__dict__:', "if False:"),
        ("the test is not made", "            if all(_agrees(module, forward, dtype) for dtype in dtypes):\n", "            if True:\n"),
        ("tested in the dtype of the moment alone", "dict.fromkeys((torch.float32, torch.bfloat16, weight.dtype))", "[weight.dtype]"),
        ("rounding is not compared", "return close and (rounded_alike or", "return close or (rounded_alike or"),
        ("gradients are not compared", "return [out.detach(), *torch.autograd.grad(out, [x, *weights], grad)]", "return [out.detach()]"),
        ("a failing forward stops the load", "except Exception as cause:", "except KeyError as cause:"),
        ("other arguments", "or len(inspect.signature(type(module).forward).parameters) != 2", ""),
        ("buffers", "if dict(module.named_buffers()) or ", "if "),
        ("autocast is ignored", ' and not torch.is_autocast_enabled("cpu")', ""),
        ("dtypes are ignored", " and x.dtype == weight.dtype", ""),
        ("joint weights the wrong way round", "gate, up = both.weight.chunk(2)", "up, gate = both.weight.chunk(2)"),
        ("any subclass of a linear layer", "if type(child) is nn.Linear}", "if isinstance(child, nn.Linear)}"),
        ("fused off the CPU", 'if not extension.available() or any(parameter.device.type != "cpu" for parameter in model.parameters()):', "if not extension.available():"),
        ("the comparison is never undone", "        for module, forward in fused:\n            module.forward = forward\n", "        pass\n"),
        ("random numbers are drawn", 'bias=child.bias is not None, device="meta")', "bias=child.bias is not None)"),
    ),
    *mutants_of(
        "selm_fast/model/policy.py",
        FUSED,
        ("fused layers are compared with themselves", "with unfused(self.model):", "if True:"),
    ),
    *mutants_of("selm_fast/model/policy.py", FUSED, ("loading does not fuse", "        fuse(model)\n", "")),
]  # fmt: skip

LAYERS_CSRC = [
    *mutants_of(
        "csrc/layers_kernels.h",
        NORM,
        ("a chain of squares is lost", "return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));", "return sum_of((sums[0] + sums[1]) + sums[2]);"),
        ("squares beyond four vectors", "    const Floats value = load<kind>(x, at, width - at);\n    sums[0] += value * value;", "    const Floats value = load<kind>(x, at, width - at);\n    sums[0] = value * value;"),
        ("eps is forgotten", "static_cast<float>(n.width) + n.eps)", "static_cast<float>(n.width))"),
        ("rounds too late", "if (n.rounds_first) value = rounded<kind>(value);", ""),
        ("no offset", "value * (load<kind>(n.weight, at, count) + n.offset)", "value * load<kind>(n.weight, at, count)"),
        ("one row in the weight's gradient", "load<Kind::f32>(n.d_weight, at, count) + g * value", "g * value"),
        ("no mean in the gradient", "(d - load<kind>(x, at, count) * slope) * inverse", "d * inverse"),
        ("a slope without one of its factors", "static_cast<float>(n.width) * inverse;\n    for", "static_cast<float>(n.width);\n    for"),
    ),
    *mutants_of(
        "csrc/layers_kernels.h",
        MLP,
        ("act is not rounded", "rounded<kind>(x * sigmoid_of<activation>(x).share)", "x * sigmoid_of<activation>(x).share"),
        ("act is not rounded the second time", "rounded<kind>(activated) * up", "activated * up"),
        ("silu of negative numbers", "bent < Floats{} ? smaller_part : larger_part,", "larger_part,"),
        ("1 - share with cancellation", "bent < Floats{} ? larger_part : smaller_part}", "1.0f - (bent < Floats{} ? smaller_part : larger_part)}"),
        ("a wrong coefficient of gelu", "CUBIC = 0.044715f", "CUBIC = 0.0447f"),
        ("a slope without its cube", "(3.0f * GELU * CUBIC)", "(GELU * CUBIC)"),
        ("the slope of the other activation", "const Floats bend = activation == Activation::silu ? x", "const Floats bend = activation != Activation::silu ? x"),
        ("the gradient of gate without up", "grad * up * slope_of", "grad * slope_of"),
        ("the gradient of up from gate", "grad * activated);", "grad * x);"),
    ),
    *mutants_of(
        "csrc/layers.cpp",
        NORM,
        ("chunks land on each other", "mine.d_weight = parts + chunk * width;", "mine.d_weight = parts;"),
        ("chunks as the threads cut them", "constexpr int64_t CHUNK_ROWS = 64;", "#define CHUNK_ROWS (int64_t{64} * at::get_num_threads())"),
        ("one chunk for all rows", "constexpr int64_t CHUNK_ROWS = 64;", "constexpr int64_t CHUNK_ROWS = 1 << 20;"),
        ("the last rows are left out", "std::min(rows, (chunk + 1) * CHUNK_ROWS)", "std::min(rows / 64 * 64, (chunk + 1) * CHUNK_ROWS)"),
        ("parts begin with what was there", "memset(mine.d_weight, 0, width * sizeof(float));", ""),
        ("no rows leave the gradient unwritten", "if (!d_weight.has_value()) return;", "if (!d_weight.has_value() || rows == 0) return;"),
        ("kernels do not check the weight", 'check(weight, "weight", {width}, dtype);\n  check(out', "check(out"),
    ),
]  # fmt: skip
