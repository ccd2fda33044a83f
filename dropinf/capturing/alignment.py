"""The table of alignment: for each function, whose its arguments are, given whose its results are.

A function of autograd's graph that is not here loses the owners of all that it was given; that
costs passes of one loss each, and never a wrong row. To add a function, add its name in the graph,
which is `type(y.grad_fn).__name__` without "Backward0", and a line to
tests/capturing/test_alignment.py.
"""

from __future__ import annotations

from dropinf.capturing import index_rules
from dropinf.capturing import owner_rules as rules
from dropinf.capturing.owner_rules import Rule, of_first

# Rule -> the functions that it holds for.
_TABLE: list[tuple[Rule, str]] = [
    (
        rules.elementwise,
        """
        Abs Add Addcdiv Addcmul Alias Angle Asin Asinh Acos Acosh Atan Atan2 Atanh Ceil Celu
        Clamp ClampMax ClampMin Clone Complex Conj ConjPhysical Copy Copysign Cos Cosh Deg2Rad
        Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expand Expm1 Floor Fmax Fmin Fmod Frac Gelu
        Hardshrink Hardsigmoid Hardswish Hardtanh Hypot I0 LeakyRelu Lerp Lgamma Log Log10 Log1P
        Log2 LogSigmoid Logaddexp Logaddexp2 Logit MaskedFill Maximum Minimum Mish Mul NanToNum
        NativeDropout Neg Pow Rad2Deg Reciprocal Relu Remainder Round Rsqrt Rsub Sgn Sigmoid
        Sign Silu Sin Sinc Sinh Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Tril Triu
        Trunc Where Xlogy
        """,
    ),
    (rules.reshape, "ReshapeAlias Squeeze UnsafeView Unsqueeze View"),
    (rules.permute, "Permute"),
    (rules.transpose, "Transpose T"),
    (
        rules.reduce,
        """
        Amax Amin Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Nansum Nanmedian
        Norm Prod Std Sum Var
        """,
    ),
    (
        rules.over,
        """
        Cummax Cummin Cumprod Cumsum FftC2C FftC2R FftR2C Glu LinalgCross LogSoftmax
        Logcumsumexp SafeSoftmax Softmax Sort Topk
        """,
    ),
    (
        rules.last(2),
        """
        Cholesky LinalgCholeskyEx LinalgInvEx LinalgSolveEx LinalgSolveTriangular
        ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention
        ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu
        ScaledDotProductFusedAttentionOverrideable
        """,
    ),
    (of_first(rules.layer_norm), "FusedRmsNorm NativeLayerNorm"),
    (
        of_first(rules.first_dim),
        """
        AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D AvgPool2D
        AvgPool3D ChannelShuffle Col2Im Convolution ConvolutionOverrideable CudnnConvolution Im2Col
        MaxPool2DWithIndices MaxPool3DWithIndices MkldnnAdaptiveAvgPool2D MkldnnConvolution
        NativeGroupNorm PixelShuffle PixelUnshuffle ReflectionPad1D ReflectionPad2D
        ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D UpsampleBicubic2D
        UpsampleBicubic2DAa UpsampleBilinear2D UpsampleBilinear2DAa UpsampleLinear1D
        UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D
        UpsampleNearestExact2D UpsampleNearestExact3D UpsampleTrilinear3D
        """,
    ),
    (rules.all_first_dim, "AffineGridGenerator GridSampler2D GridSampler3D"),
    (of_first(rules.batch_norm), "CudnnBatchNorm NativeBatchNorm"),
    (rules.product(0), "Bmm Mm"),
    (rules.product(1), "Addmm Baddbmm"),
    (rules.mv, "Mv"),
    (rules.dot, "Dot"),
    (rules.addmv, "Addmv"),
    (index_rules.cat, "Cat"),
    (index_rules.stack, "Stack"),
    (of_first(index_rules.slice_of), "Slice"),
    (of_first(index_rules.select), "Select"),
    (of_first(index_rules.split), "Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes"),
    (of_first(index_rules.unbind), "Unbind"),
    (of_first(index_rules.index), "Index UnsafeIndex"),
    (of_first(index_rules.index_select), "IndexSelect"),
    (of_first(index_rules.gather), "Gather"),
    (of_first(index_rules.flip), "Flip"),
    (of_first(index_rules.roll), "Roll"),
    (of_first(index_rules.repeat), "Repeat"),
    (of_first(index_rules.pad), "ConstantPadNd"),
    (of_first(index_rules.diagonal), "Diagonal"),
    (of_first(index_rules.unfold), "Unfold"),
    (index_rules.written, "IndexAdd IndexCopy Scatter ScatterAdd ScatterReduce"),
    (index_rules.index_put, "IndexPut IndexPutImpl UnsafeIndexPut"),
    (index_rules.masked_scatter, "MaskedScatter"),
    (index_rules.copied, "CopySlices"),
    (rules.pairs, "ViewAsComplex ViewAsReal"),
    (rules.nll, "NllLoss NllLoss2D"),
    (
        rules.loss,
        """
        BinaryCrossEntropy BinaryCrossEntropyWithLogits HuberLoss MseLoss SmoothL1Loss
        SoftMarginLoss
        """,
    ),
    (of_first(rules.ctc), "CtcLoss"),
]

RULES: dict[str, Rule] = {name: rule for rule, names in _TABLE for name in names.split()}
