// The AsyncAPI project's own parser over one document: node asyncapi.cjs PACKAGES_DIR FILE
// Exits with 1 unless the document is valid; what is more than a hint counts.
const { readFileSync } = require("node:fs");
const { createRequire } = require("node:module");

const [packages, file] = process.argv.slice(2);
const { Parser } = createRequire(`${packages}/`)("@asyncapi/parser");
const HINT = 2;

new Parser().parse(readFileSync(file, "utf8")).then(({ document, diagnostics }) => {
  const problems = diagnostics.filter((found) => found.severity < HINT);
  for (const found of problems) {
    console.error(`${found.code}: ${found.message} (${found.path.join(".")})`);
  }
  if (document === undefined || problems.length > 0) {
    process.exit(1);
  }
  console.log(`AsyncAPI ${document.version()}: ${document.allMessages().length} messages, valid`);
});
