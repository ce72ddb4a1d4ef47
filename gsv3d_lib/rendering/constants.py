"""The numbers that all rasterisers share; they are gsplat's."""

import math

EPS2D = 0.3  # pixels^2 on a 2D covariance's diagonal: splats are as wide as a pixel
NEAR_PLANE, FAR_PLANE = 0.01, 1e10  # z-depths outside are not drawn
ALPHA_MIN = 1 / 255  # fainter contributions are skipped ...
MAX_EXTENT = math.sqrt(2 * math.log(1 / ALPHA_MIN))  # ... so none is beyond 3.33 deviations
ALPHA_MAX = 0.999  # 1 - alpha must not reach zero
TRANSMITTANCE_MIN = 1e-4  # a pixel ends before the Gaussian that takes it to this
FRUSTUM_MARGIN = 0.15  # of the image size: beyond it, the linearised projection is held constant
TILE = 16  # pixels
