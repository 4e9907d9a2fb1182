"All kinds of fuzz cases, imported once for all children."
import fuzz_cli, fuzz_files, fuzz_images, fuzz_nets  # noqa: F401, E401
import vfmvae.cli, vfmvae.generation, vfmvae.labs, vfmvae.recipes  # noqa: F401, E401
import matplotlib.backends.backend_agg, matplotlib.font_manager  # noqa: F401  (asks the system for its fonts), E401
import torch._dynamo  # noqa: F401  (some factories import it at their first call)
