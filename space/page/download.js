(file) => {
  const name = file.orig_name || "cutout.png";
  Object.assign(document.createElement("a"), { href: file.url, download: name }).click();
}
