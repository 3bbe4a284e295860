// How a picture is shown: zoom and pan, and for grey ones window and level. Nothing of it changes the picture.
"use strict";

const WHOLE = { scale: 1, x: 0, y: 0, width: 255, level: 127.5 };
const MOST = 16; // times as large as it fits

class Viewer {
  // `frame` holds the picture; `tell` is called with what is set, in words.
  constructor(frame, tell) {
    Object.assign(this, { frame, tell, image: null, grey: false, ...WHOLE });
    this.pointers = new Map(); // pointer id -> its last event
    frame.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), event);
    }, { passive: false });
    frame.addEventListener("dblclick", (event) => (this.scale > 1 ? this.reset() : this.zoom(2, event)));
    frame.addEventListener("contextmenu", (event) => { if (this.grey) event.preventDefault(); });
    frame.addEventListener("pointerdown", (event) => {
      frame.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, event);
    });
    frame.addEventListener("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointercancel"]) {
      frame.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
    window.addEventListener("resize", () => this.draw());
  }

  show(image, grey) {
    Object.assign(this, { image, grey });
    image.draggable = false;
    this.frame.replaceChildren(image);
    this.reset();
  }

  reset() {
    Object.assign(this, WHOLE);
    this.draw();
  }

  // Around a point of the window; by default around the middle.
  zoom(factor, at) {
    const box = this.frame.getBoundingClientRect();
    const [x, y] = at ? [at.clientX - box.left, at.clientY - box.top] : [box.width / 2, box.height / 2];
    const scale = Math.min(MOST, Math.max(1, this.scale * factor));
    this.x = x - (x - this.x) * (scale / this.scale);
    this.y = y - (y - this.y) * (scale / this.scale);
    this.scale = scale;
    this.draw();
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.draw();
  }

  // Window and level as in radiology: `width` grey values from black to white, around `level`.
  adjust(width, level) {
    if (!this.grey) return;
    this.width = Math.min(512, Math.max(8, width));
    this.level = Math.min(255, Math.max(0, level));
    this.draw();
  }

  drag(event) {
    const last = this.pointers.get(event.pointerId);
    if (!last) return;
    const [dx, dy] = [event.clientX - last.clientX, event.clientY - last.clientY];
    const other = [...this.pointers.values()].find((pointer) => pointer.pointerId !== event.pointerId);
    if (other) {
      const gap = (at) => Math.hypot(at.clientX - other.clientX, at.clientY - other.clientY) || 1;
      const middle = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
      this.zoom(gap(event) / gap(last), middle);
    } else if (event.buttons === 2) this.adjust(this.width + dx, this.level + dy / 2);
    else this.pan(dx, dy);
    this.pointers.set(event.pointerId, event);
  }

  draw() {
    if (!this.image) return;
    const { scale, width, level } = this, limit = (size) => size * (1 - scale);
    this.x = Math.min(0, Math.max(limit(this.frame.clientWidth), this.x));
    this.y = Math.min(0, Math.max(limit(this.frame.clientHeight), this.y));
    this.image.style.transform = `translate(${this.x}px, ${this.y}px) scale(${scale})`;
    this.frame.style.touchAction = scale > 1 ? "none" : "pan-y"; // a finger scrolls the page, or moves the picture
    const windowed = width !== WHOLE.width || level !== WHOLE.level;
    for (const part of document.querySelectorAll("#window feComponentTransfer > *")) {
      part.setAttribute("slope", 255 / width);
      part.setAttribute("intercept", 0.5 - level / width);
    }
    this.image.style.filter = windowed ? "url(#window)" : "";
    const zoomed = scale > 1 ? [`zoom ${scale.toFixed(1)}`] : [];
    this.tell([...zoomed, ...(windowed ? [`window ${Math.round(width)}, level ${Math.round(level)}`] : [])].join(", "));
  }

  // What the buttons and the keys do, by name.
  act(name) {
    const step = this.frame.clientWidth / 8;
    ({
      in: () => this.zoom(1.25), out: () => this.zoom(0.8), reset: () => this.reset(),
      left: () => this.pan(step, 0), right: () => this.pan(-step, 0), up: () => this.pan(0, step),
      down: () => this.pan(0, -step),
      harder: () => this.adjust(this.width / 1.25, this.level), softer: () => this.adjust(this.width * 1.25, this.level),
      brighter: () => this.adjust(this.width, this.level - 8), darker: () => this.adjust(this.width, this.level + 8),
    })[name]();
  }
}
