// The app's picture: dropped or chosen, with its mask, which a brush corrects.
function render({model, el}) {
  el.innerHTML = `
    <style>
      .gsv3d-drop { border: 2px dashed #999; border-radius: 8px; padding: 12px; text-align: center; max-width: 460px; }
      .gsv3d-drop.over { border-color: #2a6fdb; background: #2a6fdb22; }
      .gsv3d-drop canvas { max-width: 100%; touch-action: none; cursor: crosshair; margin-top: 8px; border-radius: 4px; }
      .gsv3d-drop button, .gsv3d-drop label { margin: 2px 6px 2px 0; font: inherit; }
      .gsv3d-drop button { padding: 4px 10px; cursor: pointer; }
      .gsv3d-drop [hidden] { display: none; }
    </style>
    <div class="gsv3d-drop" role="group" aria-label="Picture and mask">
      <button class="choose">Choose a picture</button> or drop one here
      <input type="file" accept="image/*" aria-label="Picture" hidden>
      <canvas hidden tabindex="0" role="img" aria-label="The picture; what is not the object is dark. Paint to correct."></canvas>
      <div class="brush" hidden>
        <label><input type="radio" name="brush" value="255" checked> add</label>
        <label><input type="radio" name="brush" value="0"> remove</label>
        <label>brush <input type="range" class="size" min="2" max="60" value="14" aria-label="Size of the brush"></label>
        <button class="undo">Undo all</button>
      </div>
    </div>`;
  const find = selector => el.querySelector(selector), zone = find(".gsv3d-drop"), canvas = find("canvas");
  const file = find("input[type=file]"), screen = canvas.getContext("2d");
  const mask = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  let picture = null, first = null, last = null;

  // ---------------------------------------------------------------- the picture
  const LARGE = 8e6;                  // bytes; a server's sockets take ten million
  async function smaller(blob) {      // an upload that is too large is shrunk here
    const image = await createImageBitmap(blob), scale = Math.min(1, 2048 / Math.max(image.width, image.height));
    const copy = new OffscreenCanvas(Math.round(image.width * scale), Math.round(image.height * scale));
    copy.getContext("2d").drawImage(image, 0, 0, copy.width, copy.height);
    return copy.convertToBlob({type: "image/webp", quality: 0.95});
  }
  async function take(chosen) {
    if (!chosen) return;
    try {
      const blob = chosen.size > LARGE ? await smaller(chosen) : chosen;
      model.send({kind: "picture", name: chosen.name}, undefined, [await blob.arrayBuffer()]);
    } catch {
      model.send({kind: "unreadable", name: chosen.name});
    }
  }
  find(".choose").addEventListener("click", () => file.click());
  file.addEventListener("change", () => { take(file.files[0]); file.value = ""; });
  for (const kind of ["dragover", "dragleave", "drop"])
    zone.addEventListener(kind, event => {
      event.preventDefault();
      zone.classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });

  // ---------------------------------------------------------------- the mask
  const loaded = address => new Promise((done, failed) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = failed;
    image.src = address;
  });
  async function show() {
    const shown = model.get("shown");
    canvas.hidden = find(".brush").hidden = !shown;
    if (!shown) return;
    picture = await loaded(shown);
    const alpha = await loaded(model.get("mask"));
    for (const each of [canvas, mask.canvas]) Object.assign(each, {width: picture.width, height: picture.height});
    mask.drawImage(alpha, 0, 0);
    first = mask.getImageData(0, 0, canvas.width, canvas.height);
    draw();
  }
  function draw() {
    const veil = mask.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < veil.data.length; i += 4) {
      const outside = 255 - veil.data[i];
      veil.data[i] = 30; veil.data[i + 1] = 20; veil.data[i + 2] = 60; veil.data[i + 3] = 0.8 * outside;
    }
    const over = new OffscreenCanvas(canvas.width, canvas.height);
    over.getContext("2d").putImageData(veil, 0, 0);
    screen.drawImage(picture, 0, 0);
    screen.drawImage(over, 0, 0);
  }
  function stroke(event) {
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    const grey = el.querySelector("input[name=brush]:checked").value;
    mask.strokeStyle = `rgb(${grey} ${grey} ${grey})`;
    mask.lineWidth = 2 * find(".size").value * scale;
    mask.lineCap = "round";
    mask.beginPath();
    mask.moveTo(...(last ?? [x, y]));
    mask.lineTo(x, y);
    mask.stroke();
    last = [x, y];
    draw();
  }
  async function send() {
    const blob = await mask.canvas.convertToBlob({type: "image/png"});
    model.send({kind: "mask"}, undefined, [await blob.arrayBuffer()]);
  }
  canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); last = null; stroke(event); });
  canvas.addEventListener("pointermove", event => { if (last && event.buttons) stroke(event); });
  canvas.addEventListener("pointerup", () => { last = null; send(); });
  find(".undo").addEventListener("click", () => { mask.putImageData(first, 0, 0); draw(); send(); });
  model.on("change:shown", show);
  show();
}
export default {render};
