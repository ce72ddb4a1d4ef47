"""The numbers that all rasterisers share; they are gsplat's."""

import math

# pixels^2 added to the diagonal of a 2D covariance: no splat is much thinner than a
# pixel
EPS2D = 0.3
NEAR_PLANE, FAR_PLANE = 0.01, 1e10  # z-depths outside are not drawn
ALPHA_MIN = 1 / 255  # fainter contributions are skipped ...
# ... so none is made beyond 3.33 standard deviations
MAX_EXTENT = math.sqrt(2 * math.log(1 / ALPHA_MIN))
ALPHA_MAX = 0.999  # 1 - alpha must not reach zero
# a pixel is finished before the Gaussian that would take it to this or below
TRANSMITTANCE_MIN = 1e-4
FRUSTUM_MARGIN = 0.15  # of the image size: beyond it, the linearised projection is held constant
TILE = 16  # pixels
