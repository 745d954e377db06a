"""Plain single-device torch networks.

Shapes stand behind names: B batch, F features, C columns of ids, E embedding, H hidden, K outputs, X Y Z height,
width and channels of an image. A network is built from a Contract and the number of outputs, and takes the
contract's inputs as tensors in their order, images as float32 in their scale; a class of your own does the same.
"""
