// A splat renderer that needs nothing but this page. It draws what gsv3d_lib.render() draws: the same cameras
// (z up, azimuth and elevation in degrees, field of view across the shorter side), projection and blending.
const TEXELS = 4, TEXTURE_WIDTH = 1024;
const MODES = ["colour", "depth", "normals", "opacity"];

const VERTEX_SHADER = `#version 300 es
precision highp float;
precision highp int;
uniform highp sampler2D splats;       // 4 texels: (mean, opacity) (xx xy xz yy) (yz zz nx ny) (colour, nz)
uniform mat3 rotation;                // world to camera: x right, y down, z forward
uniform vec3 translation;
uniform float focal;                  // pixels
uniform vec2 size;                    // pixels
uniform float reach;                  // radius of the object, for depth
uniform int mode;                     // as in MODES
in uint id;
out vec2 offset;                      // pixels from the splat's centre
flat out vec3 conic;                  // inverse 2D covariance: xx, xy, yy
flat out vec4 color;

vec3 shade(vec3 colour, vec3 normal, vec3 p) {
  if (mode == 1) return vec3(clamp(0.5 + 0.5 * (translation.z - p.z) / reach, 0.0, 1.0));   // near is light
  if (mode == 2) {                    // the shortest axis, turned to the camera: x right, y up, z to the eye
    vec3 n = rotation * normal;
    n *= dot(n, p) > 0.0 ? -1.0 : 1.0;
    return 0.5 + 0.5 * n * vec3(1.0, -1.0, -1.0);
  }
  return mode == 3 ? vec3(1.0) : colour;
}

void main() {
  ivec2 at = ivec2(int(id) * ${TEXELS} % ${TEXTURE_WIDTH}, int(id) * ${TEXELS} / ${TEXTURE_WIDTH});
  vec4 mean = texelFetch(splats, at, 0), a = texelFetch(splats, at + ivec2(1, 0), 0);
  vec4 b = texelFetch(splats, at + ivec2(2, 0), 0), c = texelFetch(splats, at + ivec2(3, 0), 0);
  gl_Position = vec4(2.0, 2.0, 2.0, 1.0);                                  // outside: not drawn
  vec3 p = rotation * mean.xyz + translation;
  if (p.z < 0.01 || mean.w < 1.0 / 255.0) return;
  color = vec4(shade(c.rgb, vec3(b.zw, c.w), p), mean.w);

  mat3 sigma = mat3(a.x, a.y, a.z, a.y, a.w, b.x, a.z, b.x, b.y);          // 3D covariance
  vec2 edge = 0.65 * size / focal;                                         // 15 % outside of the frame
  vec2 slope = clamp(p.xy / p.z, -edge, edge);
  vec3 jx = focal / p.z * vec3(1.0, 0.0, -slope.x) * rotation;             // rows of J W; v * M is the transpose's M v
  vec3 jy = focal / p.z * vec3(0.0, 1.0, -slope.y) * rotation;
  float xx = dot(jx, sigma * jx) + 0.3, xy = dot(jx, sigma * jy), yy = dot(jy, sigma * jy) + 0.3;
  float determinant = xx * yy - xy * xy;
  conic = vec3(yy, -xy, xx) / determinant;

  // The box around the ellipse on which alpha falls to 1/255.
  float extent = sqrt(2.0 * log(255.0 * color.a));
  vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1) * 2.0 - 1.0;
  offset = corner * (extent * sqrt(vec2(xx, yy)) + 0.5);
  vec2 pixel = focal * p.xy / p.z + 0.5 * size + offset;
  gl_Position = vec4((2.0 * pixel / size - 1.0) * vec2(1.0, -1.0), 0.0, 1.0);
}`;

const FRAGMENT_SHADER = `#version 300 es
precision highp float;
in vec2 offset;
flat in vec3 conic;
flat in vec4 color;
out vec4 pixel;
void main() {
  float s = 0.5 * (conic.x * offset.x * offset.x + conic.z * offset.y * offset.y) + conic.y * offset.x * offset.y;
  float alpha = min(0.999, color.a * exp(-s));
  if (alpha < 1.0 / 255.0) discard;
  pixel = vec4(color.rgb * alpha, alpha);                                  // premultiplied
}`;

// ---------------------------------------------------------------- from the page's text to a texture

async function decoded(base64) {      // gzip in base64 -> bytes
  const text = atob(base64.trim()), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function half(code) {                 // float16 -> number, positive
  const exponent = code >> 10, fraction = code & 1023;
  return exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction;
}

// 23 planes of `count` bytes: mean 3 x 24 bits, scale 3 x float16, RGBA, quaternion; all little endian.
function unpack(bytes, {count, low, step}) {
  const plane = (k, i) => bytes[k * count + i];
  const rows = Math.max(1, Math.ceil(count * TEXELS / TEXTURE_WIDTH));
  const texture = new Float32Array(rows * TEXTURE_WIDTH * 4), means = new Float32Array(count * 3);
  const scales = new Float64Array(3), quaternion = new Float64Array(4);
  for (let i = 0; i < count; i++) {
    const at = i * TEXELS * 4;
    for (let k = 0; k < 3; k++) {
      const code = plane(3 * k, i) + 256 * plane(3 * k + 1, i) + 65536 * plane(3 * k + 2, i);
      means[3 * i + k] = texture[at + k] = low[k] + step[k] * code;
      scales[k] = half(plane(9 + 2 * k, i) + 256 * plane(10 + 2 * k, i));
      texture[at + 12 + k] = plane(15 + k, i) / 255;
    }
    texture[at + 3] = plane(18, i) / 255;
    for (let k = 0; k < 4; k++) quaternion[k] = plane(19 + k, i) - 128;
    shape(texture, at + 4, scales, quaternion);
  }
  return {count, means, texture, rows, depths: new Float32Array(count), buckets: new Uint16Array(count),
          order: new Uint32Array(count)};
}

const matrix = new Float64Array(9);   // R, then R S, of the splat at hand
function shape(out, at, scales, quaternion) {                              // R S S R^T: xx xy xz yy yz zz; the normal
  let w = quaternion[0], x = quaternion[1], y = quaternion[2], z = quaternion[3];
  const length = Math.sqrt(w * w + x * x + y * y + z * z) || 1;
  w /= length; x /= length; y /= length; z /= length;
  matrix[0] = 1 - 2 * (y * y + z * z); matrix[1] = 2 * (x * y - w * z); matrix[2] = 2 * (x * z + w * y);
  matrix[3] = 2 * (x * y + w * z); matrix[4] = 1 - 2 * (x * x + z * z); matrix[5] = 2 * (y * z - w * x);
  matrix[6] = 2 * (x * z - w * y); matrix[7] = 2 * (y * z + w * x); matrix[8] = 1 - 2 * (x * x + y * y);
  const thin = scales[0] <= scales[1] && scales[0] <= scales[2] ? 0 : scales[1] <= scales[2] ? 1 : 2;
  out[at + 6] = matrix[thin]; out[at + 7] = matrix[3 + thin]; out[at + 11] = matrix[6 + thin];
  for (let k = 0; k < 9; k++) matrix[k] *= scales[k % 3];
  for (let i = 0; i < 9; i += 3)
    for (let j = i; j < 9; j += 3)
      out[at++] = matrix[i] * matrix[j] + matrix[i + 1] * matrix[j + 1] + matrix[i + 2] * matrix[j + 2];
}

// ---------------------------------------------------------------- drawing

// Far to near by z-depth: a counting sort, linear in the number of splats.
const BUCKETS = 65536, starts = new Uint32Array(BUCKETS + 1);
function sortByDepth(scene, forward) {
  const {count, means, depths, buckets, order} = scene;
  let low = Infinity, high = -Infinity;
  for (let i = 0; i < count; i++) {
    const z = forward[0] * means[3 * i] + forward[1] * means[3 * i + 1] + forward[2] * means[3 * i + 2];
    depths[i] = z;
    if (z < low) low = z;
    if (z > high) high = z;
  }
  const scale = (BUCKETS - 1) / Math.max(high - low, 1e-9);
  starts.fill(0);
  for (let i = 0; i < count; i++) starts[(buckets[i] = Math.floor((high - depths[i]) * scale)) + 1]++;
  for (let b = 0; b < BUCKETS; b++) starts[b + 1] += starts[b];
  for (let i = 0; i < count; i++) order[starts[buckets[i]]++] = i;
}

function worldToCamera(view) {        // the camera looks at the origin, z up: rows right, down, forward
  const a = view.azimuth * Math.PI / 180, e = view.elevation * Math.PI / 180;
  return {right: [-Math.sin(a), Math.cos(a), 0],
          down: [Math.sin(e) * Math.cos(a), Math.sin(e) * Math.sin(a), -Math.cos(e)],
          forward: [-Math.cos(e) * Math.cos(a), -Math.cos(e) * Math.sin(a), -Math.sin(e)]};
}

class Renderer {
  constructor(canvas) {
    const gl = canvas.getContext("webgl2", {alpha: false, antialias: false, depth: false, preserveDrawingBuffer: true});
    if (!gl) throw new Error("no WebGL 2");
    this.gl = gl;
    this.program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX_SHADER], [gl.FRAGMENT_SHADER, FRAGMENT_SHADER]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(this.program, shader);
    }
    gl.linkProgram(this.program);
    gl.useProgram(this.program);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, filter, gl.NEAREST);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    const id = gl.getAttribLocation(this.program, "id");
    gl.enableVertexAttribArray(id);
    gl.vertexAttribIPointer(id, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(id, 1);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }

  show(scene) {
    const gl = this.gl;
    this.scene = scene;
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, TEXTURE_WIDTH, scene.rows, 0, gl.RGBA, gl.FLOAT, scene.texture);
  }

  draw(view, mode, ground) {          // ground: colour behind, three numbers
    const gl = this.gl, canvas = gl.canvas, at = name => gl.getUniformLocation(this.program, name);
    const {right, down, forward} = worldToCamera(view);
    const width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    const height = Math.max(1, Math.round(canvas.clientHeight * devicePixelRatio));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
    gl.viewport(0, 0, width, height);
    gl.clearColor(...(mode === "depth" || mode === "opacity" ? [0, 0, 0] : ground), 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (!this.scene) return;
    sortByDepth(this.scene, forward);
    gl.uniformMatrix3fv(at("rotation"), true, [...right, ...down, ...forward]);
    gl.uniform3f(at("translation"), 0, 0, view.distance);
    gl.uniform1f(at("focal"), Math.min(width, height) / (2 * Math.tan(view.fov * Math.PI / 360)));
    gl.uniform2f(at("size"), width, height);
    gl.uniform1f(at("reach"), view.reach);
    gl.uniform1i(at("mode"), MODES.indexOf(mode));
    gl.bufferData(gl.ARRAY_BUFFER, this.scene.order, gl.DYNAMIC_DRAW);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.scene.count);
  }
}
