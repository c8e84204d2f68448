// Checks the schemas in deploy/workers/schemas with Ajv: they are valid, their examples are, and bodies of webhooks are
// judged as they should be. Arguments: the folder of the schemas, and a file of JSON lines
// `{"name", "valid", "schema", "value"}`. Prints what is wrong, and exits with 1 if anything is.
const fs = require("node:fs");
const path = require("node:path");
const Ajv = require("ajv/dist/2020").default;

const [folder, cases] = process.argv.slice(2);
const files = fs.readdirSync(folder).filter((file) => file.endsWith(".schema.json"));
const schemas = files.map((file) => [file, JSON.parse(fs.readFileSync(path.join(folder, file), "utf8"))]);
// strict: a keyword that does not exist, such as a misspelt one, is an error. An `if` names the type of its object above.
const ajv = new Ajv({ strict: true, strictTypes: false, strictRequired: false, allErrors: true });
const wrong = [];
schemas.forEach(([, schema]) => ajv.addSchema(schema));
const id = (file) => schemas.find(([name]) => name === file)[1].$id;

function judge(name, schema, valid, value) {
  if (ajv.validate(schema, value) !== valid) {
    wrong.push(`${name}: ${valid ? ajv.errorsText() : "is valid and should not be"}`);
  }
}

function described(name, schema, inside) {
  const named = Object.entries(schema.properties ?? {});
  if (inside && !schema.description) wrong.push(`${name} has no description`);
  named.forEach(([property, inner]) => described(`${name}.${property}`, inner, true));
}

for (const [file, schema] of schemas) {
  if (!schema.$id.endsWith(`/${file}`)) wrong.push(`${file}: its $id has another name`);
  described(file, schema, true);
  (schema.examples ?? []).forEach((example) => judge(`an example of ${file}`, schema.$id, true, example));
  for (const [property, inner] of Object.entries(schema.properties ?? {})) {
    const pointer = `${schema.$id}#/properties/${property}`;
    (inner.examples ?? []).forEach((example) => judge(`an example of ${file}.${property}`, pointer, true, example));
  }
}
const lines = fs.readFileSync(cases, "utf8").split("\n").filter(Boolean).map(JSON.parse);
lines.forEach(({ name, valid, schema, value }) => judge(name, id(schema), valid, value));
if (schemas.length === 0 || lines.length === 0) wrong.push("there was nothing to check");
wrong.forEach((line) => console.log(line));
process.exit(wrong.length === 0 ? 0 : 1);
