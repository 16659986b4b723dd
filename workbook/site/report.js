"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // All code of a page at once.
  all("button[data-code]").forEach((button) => button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    all("details.code").forEach((one) => { one.open = shown; });
    button.setAttribute("aria-pressed", shown);
    button.textContent = shown ? "Hide code" : "Show code";
  }));

  // On paper everything is unfolded but the code; on a narrow screen the contents are folded.
  addEventListener("beforeprint", () => all("details:not(.code)").forEach((one) => { one.open = true; }));
  if (matchMedia("(max-width: 44rem)").matches) all(".contents details").forEach((one) => { one.open = false; });

  // What is wider than the page can be scrolled by keyboard, too.
  const reach = () => all(".scroll").forEach((box) => {
    const wide = box.scrollWidth > box.clientWidth + 1;
    const name = box.querySelector("caption")?.textContent || box.dataset.label;
    for (const [key, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", name]])
      wide ? box.setAttribute(key, value) : box.removeAttribute(key);
  });
  addEventListener("load", reach);
  addEventListener("resize", reach);

  const data = document.getElementById("examples");
  if (!data) return;
  const examples = JSON.parse(data.textContent);
  const one = (within, name) => within.querySelector(`[data-${name}]`);

  // Radio buttons with a small picture each, for the photograph.
  const photographs = (exhibit, changed) => {
    const field = one(exhibit, "photographs");
    examples.photographs.forEach((photo, index) => {
      const pick = field.appendChild(document.createElement("label"));
      pick.className = "pick";
      const input = Object.assign(document.createElement("input"), {
        type: "radio", name: `photograph-${exhibit.id}`, value: index, checked: index === 0 });
      input.addEventListener("change", () => changed(index));
      pick.append(input, Object.assign(new Image(48, 48), { src: photo.images.original.png, alt: photo.name }));
    });
  };

  // Two versions of a photograph, one left and one right of a line that is moved.
  all("[data-compare]").forEach((exhibit) => {
    const box = exhibit.querySelector(".compare");
    const [left, right] = [one(exhibit, "left"), one(exhibit, "right")];
    const slider = box.querySelector("input");
    let chosen = 0;
    const move = () => {
      box.style.setProperty("--at", `${slider.value}%`);
      slider.setAttribute("aria-valuetext", `${slider.value} % ${examples.names[left.value]}, the rest ${examples.names[right.value]}`);
    };
    const draw = () => {
      const photo = examples.photographs[chosen];
      const said = [[left, ".over", ".tag.left"], [right, ".under", ".tag.right"]].map(([side, image, tag]) => {
        const version = photo.images[side.value];
        const name = examples.names[side.value];
        Object.assign(box.querySelector(image), { src: version.png, alt: `${photo.name}, ${name}` });
        box.querySelector(tag).textContent = name;
        return version.psnr === undefined ? null : `${name}: PSNR ${version.psnr.toFixed(1)} dB, LPIPS-Alex ${version.lpips_alex.toFixed(3)}`;
      });
      one(exhibit, "said").textContent = `${photo.name}. ${said.filter(Boolean).join("; ")}`;
      move();
    };
    slider.addEventListener("input", move);
    for (const side of [left, right]) side.addEventListener("change", draw);
    photographs(exhibit, (index) => { chosen = index; draw(); });
    draw();
  });

  // A photograph's file that arrives byte after byte.
  all("[data-file]").forEach((exhibit) => {
    const slider = exhibit.querySelector("input[type=range]");
    let chosen = 0;
    const draw = () => {
      const photo = examples.photographs[chosen];
      const { steps, bytes, original } = photo.file;
      Object.assign(slider, { min: steps[0].bytes, max: bytes });
      const step = steps.findLast((each) => each.bytes <= slider.value);
      const text = `${slider.value} of ${bytes} bytes: ${step.scales} of ${steps.length} scales, ${step.size} x ${step.size} px; PSNR ${step.psnr.toFixed(1)} dB, LPIPS-Alex ${step.lpips_alex.toFixed(3)}`;
      Object.assign(one(exhibit, "partial"), { src: step.png, alt: `${photo.name} from ${text}` });
      Object.assign(one(exhibit, "original"), { src: original, alt: `${photo.name}, original` });
      slider.setAttribute("aria-valuetext", text);
      one(exhibit, "said").textContent = text;
    };
    slider.addEventListener("input", draw);
    photographs(exhibit, (index) => { chosen = index; draw(); });
    draw();
  });
})();
