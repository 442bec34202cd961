// Check custom resources against the schemas that @kubernetes-models ships for their kinds.
//
// Argument: the folder with node_modules. Input: a JSON list of objects. Output: a JSON list of
// faults for each. The schemas know types, patterns, enumerations and required fields, but let
// unknown fields pass: those the TypeScript compiler finds, as each object is written as a literal
// of its kind's type.

import { readFileSync, existsSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const home = process.argv[2];
const models = join(home, "node_modules", "@kubernetes-models");
const ts = createRequire(join(home, "package.json"))("typescript");
const objects = JSON.parse(readFileSync(0, "utf8"));
const faults = objects.map(() => []);
const lines = [];

for (const [index, object] of objects.entries()) {
  const place = join(...object.apiVersion.split("/"), object.kind);
  const found = readdirSync(models).find((name) => existsSync(join(models, name, `${place}.js`)));
  if (!found) {
    faults[index].push("no schema for this kind");
    lines.push("");
    continue;
  }
  const path = join(models, found, place);
  const module = await import(pathToFileURL(`${path}.js`));
  try {
    new module[object.kind](object).validate();
  } catch (error) {
    faults[index].push(error.message);
  }
  lines.push(`export const o${index}: import("${path}.js").I${object.kind} = ${JSON.stringify(object)};`);
}

const source = join(home, "objects.ts");
const options = {
  module: ts.ModuleKind.NodeNext,
  moduleResolution: ts.ModuleResolutionKind.NodeNext,
  noEmit: true,
  skipLibCheck: true,
  strict: true,
  target: ts.ScriptTarget.ES2022,
  types: [],
};
const host = ts.createCompilerHost(options);
const { fileExists, readFile } = host;
host.fileExists = (path) => path === source || fileExists(path);
host.readFile = (path) => (path === source ? lines.join("\n") : readFile(path));
const { getSourceFile } = host;
host.getSourceFile = (path, version) =>
  path === source
    ? ts.createSourceFile(path, lines.join("\n"), version)
    : getSourceFile.call(host, path, version);
const program = ts.createProgram([source], options, host);
for (const one of [
  ...program.getOptionsDiagnostics(),
  ...program.getSyntacticDiagnostics(program.getSourceFile(source)),
  ...program.getSemanticDiagnostics(program.getSourceFile(source)),
]) {
  const line = one.file ? one.file.getLineAndCharacterOfPosition(one.start).line : 0;
  faults[line].push(ts.flattenDiagnosticMessageText(one.messageText, " "));
}

console.log(JSON.stringify(faults));
