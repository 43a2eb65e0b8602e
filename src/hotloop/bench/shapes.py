"""Shapes of the models of the inference race; read where torch is not imported."""

# Name -> shape of one sample, float32.
SAMPLE_SHAPES: dict[str, tuple[int, ...]] = {
    "small": (1, 28, 28),
    "big": (1, 28, 28),
    "cnn": (1, 28, 28),
    "resnet18": (3, 64, 64),
    "encoder": (32, 384),
}
# Those that take MNIST.
MNIST_MODELS = ("small", "big", "cnn")
RESNET_WIDTHS = (64, 128, 256, 512)
ENCODER_LAYERS, ENCODER_WIDTH, ENCODER_HEADS = 6, 384, 12
