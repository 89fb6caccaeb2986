import torch, copy


class CompiledGenerator(torch.nn.Module):
    def __init__(self, g):
        super().__init__()
        self.g = g.eval()

    def forward(self, z, c):
        return self.g(z, c).float()


def compile_generator(generator, *, dtype=torch.float32, compile=False):
    with torch.random.fork_rng(devices=[]):
        return CompiledGenerator(copy.deepcopy(generator))
